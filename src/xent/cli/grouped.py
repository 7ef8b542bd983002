"""A command whose help lists its options in groups, those that most people use first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click


class GroupedCommand(click.Command):
    """A command with headings over its options.

    Args:
        groups: the long names of the options under each heading, in order; others follow under "Others".
    """

    def __init__(self, *arguments: Any, groups: Mapping[str, Sequence[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under their headings."""
        options = (param for param in self.get_params(ctx) if isinstance(param, click.Option))
        left = {max(option.opts, key=len): option for option in options}
        for heading, names in (*self.groups.items(), ("Others", tuple(left))):
            chosen = [left.pop(name) for name in names if name in left]
            records = [record for param in chosen if (record := param.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
