"""Pages of one file: their templates, with the colours of both schemes.

Gives: template.
Used by: app/report, app/card, app/search_command, study/page.
"""

from __future__ import annotations

from typing import Any

from silc.app.plots import DARK, LIGHT


def template(name: str) -> Any:
    """The page called `name`; whatever is put into it is escaped, and what it lacks is an error. `light` and `dark` are
    known to it. ValueError where jinja2 is missing."""
    try:
        import jinja2
    except ImportError:
        raise ValueError('pages need jinja2: pip install "silc[quickstart]".') from None
    pages = jinja2.Environment(loader=jinja2.PackageLoader("silc.app"), autoescape=True, trim_blocks=True,
                               lstrip_blocks=True, undefined=jinja2.StrictUndefined)  # fmt: skip
    pages.globals.update(light=LIGHT, dark=DARK)
    return pages.get_template(name)
