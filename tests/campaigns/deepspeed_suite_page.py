"""What `deepspeed_suite` found: complaints, the table, and the page over all results."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

__all__ = ["HEADER", "VARIANTS", "Outcomes", "complaints", "page", "rows"]

VARIANTS = {
    "stock": "DeepSpeed as it is.",
    "baseline": "The same, but every partition is written down, and `torch.cpu` gets the `get_rng_state` and "
    "`set_rng_state` that the CIFAR tests ask for where CPUs are DeepSpeed's accelerator, and that torch lacks.",
    "registered": "As baseline, and `lp_plugin.integrations.deepspeed` is imported in every process.",
    "cache-aware": 'As registered, and `configure({"lp_plugin": {"method": "cache-aware"}})` overrides the method of '
    "every module: the tests train through our partitions.",
}
"""In the order in which they run; the first two are without us."""
HEADER = (
    "variant",
    "passed",
    "failed",
    "errors",
    "hung",
    "skipped",
    "partitions",
    "registered",
    "planned by us",
    "seconds",
)
Outcomes = dict[str, dict[str, Any]]

_INTRODUCTION = """# DeepSpeed's own pipeline tests

`tests/unit/pipe` and `tests/unit/runtime/pipe` of DeepSpeed's repository, unchanged, on the DeepSpeed installed, by
`python tests/campaigns/deepspeed_suite.py CHECKOUT`. Each variant is a pytest process of its own, each distributed test
1 to 4 further ones that it spawns or forks:

"""


def complaints(result: dict[str, Any]) -> list[str]:
    """What says that the tests do not pass with us, or that it is not known; a sentence each, none if all is well."""
    passed, counts = {}, {}
    for variant, outcomes in result["tests"].items():
        passed[variant] = {name for name, each in outcomes.items() if each["outcome"] == "passed"}
        counts[variant] = dict(zip(HEADER, next(row for row in rows(result) if row[0] == variant), strict=True))
    without = passed["stock"] | passed["baseline"]
    told = [] if without else ["No test passes without us."]
    for variant, column in (("registered", "registered"), ("cache-aware", "planned by us")):
        told += [f"{name} passes without us, not in {variant}." for name in sorted(without - passed[variant])]
        if counts[variant][column] != counts["baseline"]["partitions"]:
            told.append(
                f"{variant}: {counts[variant][column]} of {counts['baseline']['partitions']} partitions {column}."
            )
    return told


def rows(result: dict[str, Any]) -> list[list[str]]:
    """A row per variant under `HEADER`; a partition counts once for each process that makes it."""
    table = []
    for variant, outcomes in result["tests"].items():
        counts = Counter(each["outcome"] for each in outcomes.values())
        made = [each for outcome in outcomes.values() for each in outcome["partitions"]]
        numbers = [counts[outcome] for outcome in ("passed", "failed", "error", "hung", "skipped")]
        numbers += [
            sum(each["processes"] for each in made if which is None or each[which])
            for which in (None, "registered", "planned")
        ]
        table.append([variant, *map(str, numbers), f"{result['variants'][variant]['seconds']:.0f}"])
    for row in table[:1]:
        row[6:9] = ["", "", ""]  # not written down
    return table


def page(results: list[dict[str, Any]]) -> str:
    """The page over results of one or more accelerators, in Markdown."""
    text = _INTRODUCTION + "".join(f"- **{name}**: {what}\n" for name, what in VARIANTS.items())
    for result in results:
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        text += (
            f"\n## {result['accelerator']}: {result['num_devices']} x {result['device']}\n\n"
            f"The tests are those of commit {result['commit']}; {versions}.\n"
            f"File: [{result['accelerator']}.json]({result['accelerator']}.json), every test in every variant.\n\n"
            + _table(HEADER, rows(result))
            + f"\n**{' '.join(complaints(result)) or 'Every test that passes without us passes with us.'}**\n"
            + _section("Not passed in every variant", (*VARIANTS, "tests", "why"), _not_passed(result["tests"]))
            + _section(
                "Where our partitions differ from DeepSpeed's",
                ("layers", "stages", "DeepSpeed's `parameters`", "`cache-aware`"),
                _other_partitions(result["tests"]),
            )
        )
    return text


def _not_passed(tests: dict[str, Outcomes]) -> list[list[str]]:
    """Tests that end alike, and say the same of it, in one row."""
    alike: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in dict.fromkeys(name for outcomes in tests.values() for name in outcomes):
        each = [tests[variant].get(name, {"outcome": "not run", "why": ""}) for variant in VARIANTS]
        ends = tuple(outcome["outcome"] for outcome in each)
        if set(ends) != {"passed"}:
            why = "; ".join(dict.fromkeys(outcome["why"] for outcome in each if outcome["why"]))
            alike[*ends, why].append(name)
    return [[*key[:-1], _listed(names).removeprefix(": "), key[-1]] for key, names in alike.items()]


def _other_partitions(tests: dict[str, Outcomes]) -> list[list[str]]:
    """Per number of layers and stages, boundaries by DeepSpeed and by us, if not the same."""
    found: dict[str, defaultdict[tuple[int, int], set[str]]] = {}
    for variant in ("baseline", "cache-aware"):
        found[variant] = defaultdict(set)
        for outcome in tests[variant].values():
            for boundaries in (each["boundaries"] for each in outcome["partitions"]):
                found[variant][boundaries[-1], len(boundaries) - 1].add(str(boundaries))
    return [
        [str(layers), str(stages), " ".join(sorted(theirs)), " ".join(sorted(found["cache-aware"][layers, stages]))]
        for (layers, stages), theirs in found["baseline"].items()
        if theirs != found["cache-aware"][layers, stages]
    ]


def _section(title: str, header: tuple[str, ...], table: list[list[str]]) -> str:
    return f"\n{title}:\n\n{_table(header, table)}" if table else ""


def _table(header: tuple[str, ...], table: list[list[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _listed(names: list[str]) -> str:
    return ": " + ", ".join(f"`{name.rpartition('/')[2]}`" for name in names) if names else ""
