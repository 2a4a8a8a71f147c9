"""Tables of results as data: what a row trains and evaluates, the paper's figures beside ours.

docs/reproduce.json has the paper's tables, toy/reproduce.json those of the toy world. Here they are
read, and written with figures as a page (report.md), a plot (report.png) and the tables of
docs/*.md; what runs the rows is tools/reproduce.py.
"""

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from matplotlib import pyplot as plt

from tools.figures import LEGEND, PALETTE, balanced, save_figure
from util import UserError
from util.files import (
    atomic_write,
    find,
    is_list,
    is_name,
    is_number,
    is_of,
    is_text,
    read_json,
    wrong_field,
)

Figure = tuple[float, float | None]     # a mean and, of several seeds, a standard deviation


def is_figure(value: object) -> bool:
    """Whether a value is null, a number, or [mean] or [mean, standard deviation]."""
    return value is None or is_number(value) or is_list(value, is_number) and len(value) in (1, 2)


def is_step(value: object) -> bool:
    """Whether a value is the name of a field, or a list of some."""
    return is_text(value) or is_list(value, is_text) and len(value) > 0


def is_reference(value: object) -> bool:
    """Whether a value names a field of figures, and what it is called."""
    return is_list(value, is_text, 2) and value[0] in ("paper", "ours")


def is_a(kind: type, value: object) -> bool:
    """Whether a value is a text, perhaps empty, or a dict of such texts."""
    parts = value.values() if kind is dict and isinstance(value, dict) else [value]
    return isinstance(value, kind) and all(isinstance(part, str) for part in parts)


def list_of(fits: Callable, length: int | None = None) -> Callable:
    return partial(is_list, fits=fits, length=length)


def is_dict(value: object) -> bool:
    return isinstance(value, dict)


is_string, is_texts = partial(is_a, str), partial(is_a, dict)
is_seed, is_rate = partial(is_of, int), partial(is_number, least=1e-3)
NEEDED = object()
# The fields of a world's json: what fits, and the value where there is none.
COLUMN = {"name": (is_text, NEEDED),    # of a figure
          "of": (is_text, ""),          # its evaluation; none: the mean of the row's others
          "path": (list_of(is_step), ()),       # fields of a result; of a list of some, the mean
          "benchmark": (is_name, None)}         # of the result, if an evaluation has several
ROW = {"tables": (is_text, ""),         # numbers of the paper's tables, if not the table's
       "name": (is_text, ""),
       "train": (is_string, None),      # more options of the training; none: nothing is trained
       "model": (is_text, ""),          # or which of `models` is evaluated
       "evaluate": (is_texts, {}),      # more options of evaluations
       "commands": (is_texts, {}),      # evaluations instead of the table's
       "paper": (list_of(is_figure), ()),       # the paper's figures, a column each
       "ours": (list_of(is_figure), ())}        # and those that were recorded here
TABLE = {"id": (is_text, NEEDED),       # of its place in the document
         "tables": (is_text, NEEDED),   # numbers of the paper's tables
         "title": (is_text, NEEDED), "columns": (list_of(is_dict), NEEDED),
         "rows": (list_of(is_dict), NEEDED),
         "train": (is_text, ""),        # command of its trainings
         "evaluate": (is_texts, {}),    # commands of its evaluations, by names of ours
         "show": (list_of(list_of(is_string, 2)), [["", "name"]]),      # what of a row is shown
         "seeds": (list_of(is_seed), [0]),      # {SEED} in commands
         "splits": (list_of(is_text), ()),      # {NOVEL} for each seed
         "reading": (is_text, "")}      # what the paper leaves open, and how we take it
# What a training costs whose command has the text `where`: images a second of one GPU, images of an
# epoch, and gigabytes that its folder takes.
COST = {"script": (is_name, NEEDED), "where": (is_string, NEEDED), "rate": (is_rate, NEEDED),
        "images": (is_number, NEEDED), "gb": (is_number, NEEDED)}
WORLD = {"out": (is_name, NEEDED),      # folder of the runs
         "doc": (is_name, NEEDED),      # document that has the tables
         "title": (is_text, NEEDED),
         "against": (is_reference, NEEDED),     # what a report compares with: field, its name
         "tables": (list_of(is_dict), NEEDED),
         "models": (is_texts, {}),      # commands whose products {NAME} stands for
         "costs": (list_of(is_dict), ()), "effort": (is_text, ""),      # how they were found
         "get": (is_texts, {})}         # how to get data, by a part of their path


def world_path(name: str) -> Path:
    """The file of a world: its folder's reproduce.json, or a json of one's own."""
    return find(name if name.endswith(".json") else Path(name) / "reproduce.json")


def read_world(name: str) -> SimpleNamespace:
    """The tables of a world's file; UserError if it is not as it should be."""
    path = world_path(name)

    def made(part: object, fields: dict, where: str) -> SimpleNamespace:
        needed = [name for name, (_, default) in fields.items() if default is NEEDED]
        wrong = wrong_field(part, {name: fits for name, (fits, _) in fields.items()}, needed)
        if wrong:
            raise UserError(f"{path} is no file of tables ({where}: {wrong}); correct it, "
                            "tools/report.py has its fields.")
        return SimpleNamespace(**{name: default for name, (_, default) in fields.items()} | part)

    world = made(read_json(path), WORLD, "the whole")
    world.costs = [made(cost, COST, "costs") for cost in world.costs]
    world.tables = [made(table, TABLE, "tables") for table in world.tables]
    for table in world.tables:
        for kind, fields in (("columns", COLUMN), ("rows", ROW)):
            parts = [made(part, fields, f"{kind} of {table.id}") for part in getattr(table, kind)]
            setattr(table, kind, parts)
        wrong = misfit(table, world)
        if wrong:
            raise UserError(f"{path}, table {table.id}: {wrong}; correct that.")
    return world


def misfit(table: SimpleNamespace, world: SimpleNamespace) -> str:
    """What does not fit together in a table; "" if all does."""
    for number, row in enumerate(table.rows, 1):
        evaluations = {*(row.commands or table.evaluate)}
        unknown = {column.of for column in table.columns if column.of} | {*row.evaluate}
        if not {len(row.paper), len(row.ours)} <= {0, len(table.columns)}:
            return f"row {number} has figures for other than its {len(table.columns)} columns"
        if unknown - evaluations:
            return f"row {number} has no evaluation {min(unknown - evaluations)!r}"
        if row.model and (row.model not in world.models or row.train is not None):
            return f"row {number} must have a model of 'models', {row.model!r} is none, or 'train'"
    if table.splits and len(table.splits) <= max(table.seeds):
        return f"it has {len(table.splits)} splits, too few for its seeds"
    return ""


def has_figure(against: list[str], paper: list, place: int) -> bool:
    """Whether a column of a row is worth evaluating: one without a figure in the paper is not,
    where ours are held against the paper's."""
    return against[0] != "paper" or not paper or paper[place] is not None


def laid_out(value: object, indent: str = "", in_list: bool = False) -> str:
    """Json with a line for each row, column and command."""
    def has_dicts(part: object) -> bool:
        return isinstance(part, list) and any(isinstance(entry, dict) for entry in part)

    has_keys, inner = isinstance(value, dict), indent + "  "
    if not (has_dicts(value) or has_keys and (not in_list or any(map(has_dicts, value.values())))):
        return json.dumps(value, ensure_ascii=False)
    parts = ([f"{json.dumps(key)}: {laid_out(part, inner)}" for key, part in value.items()]
             if has_keys else [laid_out(part, inner, True) for part in value])
    first, last = "{}" if has_keys else "[]"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


def record(path: Path, found: dict[tuple[str, int], list[Figure | None]]) -> None:
    """Puts figures into a world's file as `ours`, by table and number of the row, of whole rows."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for table in content["tables"]:
        for number, row in enumerate(table["rows"]):
            figures = found.get((table["id"], number), [None])
            lacks = [figure is None and has_figure(content["against"], row.get("paper", []), place)
                     for place, figure in enumerate(figures)]
            if not any(lacks) and any(figures):
                row["ours"] = [figure and [round(value, 1) for value in figure if value is not None]
                               for figure in figures]
    text = laid_out(content) + "\n"
    atomic_write(path, lambda file: Path(file).write_text(text, encoding="utf-8"))


# ------------------------------------------------------------------------------- its documents

def recorded(row: SimpleNamespace, field: str, place: int) -> Figure | None:
    """A figure of a row's `paper` or `ours`."""
    values = getattr(row, field)
    value = values[place] if values else None
    return value if value is None else (*(value if isinstance(value, list) else [value]), None)[:2]


def cell(table: SimpleNamespace, row: SimpleNamespace, field: str) -> str:
    """What is shown of a row before its figures: options, its name, its table's numbers."""
    if field in ("tables", "name"):
        return row.name if field == "name" else ", ".join((row.tables or table.tables).split())
    options = row.train if field == "train" else row.evaluate.get(field)
    if not options:
        return "the defaults" if options == "" else ""
    is_named = field == "train" and row.name and all(shown != "name" for _, shown in table.show)
    return f"`{plain(options)}`" + (f" ({row.name})" if is_named else "")


def plain(text: str) -> str:
    """Options as they are typed: {CKPT} is CKPT."""
    return re.sub(r"\{(\w+)\}", r"\1", text)


def label_of(table: SimpleNamespace, row: SimpleNamespace) -> str:
    """What a row is called in a report."""
    shown = [cell(table, row, field) for _, field in table.show if field not in ("tables", "name")]
    return row.name or " ".join(filter(None, shown)) or "the defaults"


def show(figure: Figure | None, sign: str = "") -> str:
    """A figure with one decimal; "" for none."""
    if figure is None:
        return ""
    value = round(figure[0], 1) + 0.0       # not -0.0
    return f"{value:{sign}.1f}" + ("" if figure[1] is None else f" ± {figure[1]:.1f}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |".replace("  ", " ") for line in rows)


def rendered(table: SimpleNamespace) -> str:
    """A table as it stands in a document: the paper's figures or, once some are recorded, ours and
    beside them the paper's."""
    places, has_ours = range(len(table.columns)), any(row.ours for row in table.rows)
    shown = [("ours", place, "") for place in places if has_ours]
    shown += [("paper", place, "paper: " if has_ours else "") for place in places
              if not has_ours or any(recorded(row, "paper", place) for row in table.rows)]
    head = [*(heading for heading, _ in table.show),
            *(prefix + table.columns[place].name for _, place, prefix in shown)]
    lines = [[*(cell(table, row, field) for _, field in table.show),
              *(show(recorded(row, field, place)) for field, place, _ in shown)]
             for row in table.rows]
    reading = textwrap.fill(table.reading, 100, break_long_words=False, break_on_hyphens=False)
    return markdown(head, lines) + (f"\n\n{reading}" if reading else "")


def fill(text: str, world: SimpleNamespace) -> str:
    """A document with its tables made anew, each between `<!-- table: ID -->` and `<!-- end -->`;
    UserError for an ID that is no table's."""
    tables = {table.id: table for table in world.tables}

    def made(place: re.Match) -> str:
        if place[1] not in tables:
            raise UserError(f"{world.doc} has a place for the table {place[1]!r}, but there are "
                            f"only {', '.join(tables)}; correct it.")
        return f"<!-- table: {place[1]} -->\n{rendered(tables[place[1]])}\n<!-- end -->"
    return re.sub("<!-- table: (.*?) -->.*?<!-- end -->", made, text, flags=re.DOTALL)


# --------------------------------------------------------------------------------- the report

MAX_ROWS = 20      # of a table in the plot


class Found(NamedTuple):
    """A row with what was found."""
    table: SimpleNamespace
    row: SimpleNamespace
    figures: list[Figure | None]        # a column each
    commands: list[str]                 # that made them, with the first seed


def by_table(found: Sequence[Found]) -> list[list[Found]]:
    """The rows of each table."""
    return [[line for line in found if line.table.id == id]
            for id in dict.fromkeys(line.table.id for line in found)]


def page(world: SimpleNamespace, found: Sequence[Found], made: Sequence[str],
         failed: Sequence[str] = ()) -> str:
    """The report: a section for each table, then the rows' commands, what they were made with, and
    what could not be done."""
    there = [figure for line in found for figure in line.figures]
    parts = [f"# {world.title}", f"{len(there) - there.count(None)} of {len(there)} figures."]
    for lines in by_table(found):
        table, body = lines[0].table, []
        for line in lines:
            label = label_of(table, line.row)
            for kind, figures, sign in compared(world, line):
                if any(figures) or kind == "ours":
                    body.append([label, kind, *(show(figure, sign) for figure in figures)])
                    label = ""
        head = ["", "", *(column.name for column in table.columns)]
        parts += [f"## {table.title}", markdown(head, body), *filter(None, [table.reading])]
    settings = [f"- {label_of(line.table, line.row)}: {'; '.join(line.commands)}"
                for line in found if any(line.figures)]
    parts += ["## Settings", "\n".join(dict.fromkeys(settings))] if settings else []
    for title, notes in (("Made with", made), ("Not done", failed)):
        parts += [f"## {title}", "\n".join(f"- {note}" for note in notes)] if notes else []
    return "\n\n".join(parts) + "\n"


def compared(world: SimpleNamespace, line: Found) -> list[tuple[str, list[Figure | None], str]]:
    """A row's figures beside those that they are compared with: name, figures, sign."""
    field, name = world.against
    theirs = [recorded(line.row, field, place) for place in range(len(line.figures))]
    differences = [(figure[0] - other[0], None) if figure and other else None
                   for figure, other in zip(line.figures, theirs)]
    return [(name, theirs, ""), ("ours", line.figures, ""), ("difference", differences, "+")]


def plot(world: SimpleNamespace, found: Sequence[Found]) -> plt.Figure | None:
    """Every row that has a figure, a panel for each table, but for the long ones of a search; None
    if there is no figure yet."""
    tables = by_table([line for line in found
                       if any(line.figures) and len(line.table.rows) <= MAX_ROWS])
    if not tables:
        return None
    heights = [max(0.8, sum(0.17 * len(pairs(world, line)) + 0.16 for line in lines)) + 1.2
               for lines in tables]
    figure, axes = plt.subplots(len(tables), 1, figsize=(10, sum(heights) + 0.5), squeeze=False,
                                height_ratios=heights, layout="constrained")
    figure.suptitle(world.title, fontsize=14)
    for axis, lines in zip(axes[:, 0], tables):
        draw_panel(axis, world, lines)
    return figure


def pairs(world: SimpleNamespace, line: Found) -> list[tuple[str, Figure | None, Figure | None]]:
    """Of a row's figures colour, what they are compared with, and ours, if there is one of both."""
    (_, theirs, _), (_, ours, _), _ = compared(world, line)
    return [(PALETTE[place % len(PALETTE)], *pair) for place, pair in enumerate(zip(theirs, ours))
            if any(pair)]


def draw_panel(axis: plt.Axes, world: SimpleNamespace, lines: Sequence[Found]) -> None:
    """A table: its rows downwards, in each a line and a colour for each column."""
    table, ticks, y = lines[0].table, [], 0.0
    for line in lines:
        shown = pairs(world, line)
        ticks.append(y + 0.17 * (len(shown) - 1) / 2)
        for colour, their, our in shown:
            if their and our:
                axis.plot([their[0], our[0]], [y, y], color=colour, linewidth=2, alpha=0.5)
            if their:
                axis.errorbar(their[0], y, xerr=their[1], fmt="o", color=colour, markersize=7,
                              markerfacecolor="white", elinewidth=0.8)
            if our:
                axis.errorbar(our[0], y, xerr=our[1], fmt="o", color=colour, markersize=5)
            y += 0.17
        y += 0.16
        axis.axhline(y - 0.165, color="0.88", linewidth=0.8)
    labels = [textwrap.fill(label_of(table, line.row).replace("`", ""), 40, break_on_hyphens=False)
              for line in lines]
    axis.set_yticks(ticks, labels, fontsize=9)
    axis.set_title(f"{table.title}: {world.against[1]} hollow, ours filled", fontsize=11)
    axis.set(ylim=(y - 0.1, -0.2))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [plt.Line2D([], [], color=PALETTE[place % len(PALETTE)], marker="o", linestyle="",
                          label=column.name.replace("`", ""))
               for place, column in enumerate(table.columns)]
    axis.legend(handles=handles, loc="upper center", ncols=balanced(len(handles), 8),
                **LEGEND | {"bbox_to_anchor": (0.5, 0), "borderaxespad": 2.6})


def write(world: SimpleNamespace, out: Path, found: Sequence[Found], made: Sequence[str],
          failed: Sequence[str]) -> None:
    """report.md and, once there is a figure, report.png."""
    text, figure = page(world, found, made, failed), plot(world, found)
    atomic_write(out / "report.md", lambda file: Path(file).write_text(text, encoding="utf-8"))
    if figure:
        save_figure(figure, out / "report.png")
