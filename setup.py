"Everything about the package is in settings.ini, where nbdev reads it too."
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
readme = here / "README.md"
settings = ConfigParser(delimiters=["="])
settings.read(here / "settings.ini", encoding="utf-8")
get = settings["DEFAULT"].get
lib_name = get("lib_name")
python = get("min_python")
extras = {name: shlex.split(get(f"{name}_requirements"))
          for name in ("notebooks", "import", "perceptual", "gym", "hub", "docs")}
# Who develops the package needs all of it, and the tools.
extras["dev"] = [*shlex.split(get("dev_requirements")), *sum(extras.values(), [])]

setup(
    name=lib_name,
    version=get("version"),
    description=get("description"),
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=get("author"),
    author_email=get("author_email"),
    url=get("git_url"),
    keywords=get("keywords").split(),
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    project_urls={
        "Documentation": settings["DEFAULT"]["doc_host"] + settings["DEFAULT"]["doc_baseurl"],
        "Changelog": f"{get('git_url')}/blob/{get('branch')}/CHANGELOG.md",
    },
    packages=find_packages(include=[lib_name, f"{lib_name}.*"]),
    package_data={lib_name: ["py.typed", "assets/*", "assets/*/*"]},
    python_requires=f">={python}",
    install_requires=shlex.split(get("requirements")),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(get("console_scripts")),
                  "nbdev": [f"{lib_name}={lib_name}._modidx:d"]},
    zip_safe=False,
)
