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
    classifiers=["Programming Language :: Python :: 3", "Intended Audience :: Science/Research",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=[lib_name, f"{lib_name}.*"]),
    package_data={lib_name: ["py.typed", "assets/*"]},
    python_requires=f">={python}",
    install_requires=shlex.split(get("requirements")),
    extras_require={extra: shlex.split(get(f"{extra}_requirements"))
                    for extra in ("video", "hdf5", "minari", "lerobot", "gym", "dev")},
    entry_points={"console_scripts": shlex.split(get("console_scripts")),
                  "nbdev": [f"{lib_name}={lib_name}._modidx:d"]},
    zip_safe=False,
)
