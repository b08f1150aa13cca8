"Sphinx reads this. docs/build.py makes the folder of sources, from the notebooks and the modules."
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from build import SETTINGS

project = SETTINGS["repo"]
author = SETTINGS["author"]
project_copyright = SETTINGS["copyright"]
release = SETTINGS["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "build.slug"  # the anchors of Jupyter
nb_execution_mode = "off"  # the outputs are those that are stored
nb_merge_streams = True
suppress_warnings = ["ref.python"]  # two modules may have a class of the same name

html_theme = "furo"
html_title = SETTINGS["title"]
html_css_files = ["course.css"]
html_show_sourcelink = False
html_copy_source = False
html_domain_indices = False  # its pages have pictures without a text
html_theme_options = {
    "source_repository": SETTINGS["git_url"],
    "source_branch": SETTINGS["branch"],
    "top_of_page_buttons": [],
}
mathjax_path = "mathjax/tex-chtml-full.js"
pygments_style = "friendly"
pygments_dark_style = "monokai"
