"""Show as tables: the fields of a class that have comments, and the arguments that a docstring lists line by line."""

import re

from griffe import (
    Class,
    DocstringAttribute,
    DocstringParameter,
    DocstringSectionAttributes,
    DocstringSectionParameters,
    DocstringSectionText,
    Extension,
    Function,
)

# a name, two spaces or more, the meaning, which goes on in indented lines
_ARGUMENT = re.compile(r"^(\w+) {2,}(.*(?:\n +.*)*)", re.MULTILINE)


class Fields(Extension):
    """Replaces the parsed docstrings of classes and functions."""

    def on_class_members(self, *, cls: Class, **_) -> None:
        commented = [
            DocstringAttribute(name, description=comment, annotation=field.annotation, value=field.value)
            for name, field in cls.attributes.items()
            if not name.startswith("_")
            and "property" not in field.labels
            and (comment := field.source.partition("  # ")[2])
        ]
        if cls.docstring and commented:
            cls.docstring.parsed.append(DocstringSectionAttributes(commented))

    def on_function_instance(self, *, func: Function, **_) -> None:
        if func.docstring and any(_ARGUMENT.match(part) for part in func.docstring.value.split("\n\n")):
            func.docstring.parsed[:] = [_section(part, func) for part in func.docstring.value.split("\n\n")]


def _section(part: str, func: Function) -> DocstringSectionParameters | DocstringSectionText:
    """Make a section of a paragraph of the docstring."""
    if not _ARGUMENT.match(part):
        return DocstringSectionText(part)
    return DocstringSectionParameters(
        [
            DocstringParameter(
                name,
                description=" ".join(meaning.split()),
                annotation=func.parameters[name].annotation,
                value=func.parameters[name].default,
            )
            for name, meaning in _ARGUMENT.findall(part)
        ]
    )
