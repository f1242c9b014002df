"""What a result says: ratios, tables, pictures, a page for a browser, and what changed between two results.

    python -m harlora.bench.report FOLDER DOCUMENT

puts the committed results into a document, between its markers.
"""

import base64
import itertools
import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from harlora.bench.peers import COMPARED, COMPETITORS, OURS, PEER
from harlora.bench.run import BUSY, FORMAT, RESULT, WIDE, Row, uncertain, where
from harlora.errors import InputError
from harlora.files import read_json, write_text

PAGE = "index.html"
FASTER = 1.03  # less than this is no win and no loss
MARK = "~"
LAYERS = ("One layer", "Share")  # titles of the tables of single layers
LOST, FAILED = "Where harlora loses", "Not measured"
MARKED = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
OTHERS = [over for over, of in COMPARED if of == OURS]
OF_VARIANTS = [(over, of) for over, of in COMPARED if of != OURS]
KEYS = ("case", "in_features", "out_features", "rows", "direction", "dtype", "rank", "model", "windows")


class Ratio(NamedTuple):
    """How many times as long ``over`` takes as ``of``.

    noisy: it spreads by more than 10 % from round to round, or too few rounds met the machine in its usual state.
    An interval of the median alone is no substitute: of two runs minutes apart, ratios known to 10 % each disagreed by
    more.
    """

    facts: Row
    of: Row
    over: Row
    value: float
    noisy: bool

    @property
    def text(self) -> str:
        """The ratio as tables have it."""
        return f"{self.value:.2f}{MARK * self.noisy}"


class Table(NamedTuple):
    title: str
    heads: Sequence[str]
    body: Sequence[Sequence[str]]


def load(path: Path) -> Row:
    """The result in a file, or in the folder of a run.

    Raises: InputError if it is none, or of another format.
    """
    file = path / RESULT if path.is_dir() else path
    remedy = "give the result.json of `harlora bench`, or its folder"
    result = read_json(file, remedy)
    if not isinstance(result, dict) or (result.get("bench"), result.get("format")) != ("harlora", FORMAT):
        raise InputError(f"{file}: not a result of this version's `harlora bench`; {remedy}")
    return result


def key(row: Row) -> tuple[Any, ...]:
    """What tells the case of a row from others."""
    return tuple(row.get(name) for name in KEYS)


def cases(result: Row, *kinds: str) -> dict[tuple[Any, ...], dict[str, Row]]:
    """The rows of each case by competitor, in the order in which they were measured."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in result["rows"]:
        if row["case"] in kinds:
            found.setdefault(key(row), {})[row["competitor"]] = row
    return found


def ratio(rows: Mapping[str, Row], over: str, of: str = OURS) -> Ratio | None:
    """The ratio of a competitor to one of harlora's; None where either was not timed."""
    if over not in rows or of not in rows or "median_us" not in rows[over] or "median_us" not in rows[of]:
        return None
    mine, theirs = rows[of], rows[over]
    facts = {name: mine[name] for name in KEYS if name in mine}
    found = mine["over"][over]
    spread = (found["p80"] - found["p20"]) / found["median"]
    few = "rounds" in found and uncertain(found)  # older results do not say how many
    return Ratio(facts, mine, theirs, found["median"], spread > WIDE or few)


def ratios(result: Row) -> list[Ratio]:
    """The leads of harlora and its variants in every case, over whom `COMPARED` says."""
    every = cases(result, "encoder", "step", "layer").values()
    found = (ratio(rows, over, of) for rows in every for over, of in COMPARED)
    return [each for each in found if each is not None]


def losses(result: Row) -> list[Ratio]:
    """Where another library's competitor is faster than harlora as it is without being asked for fewer bits."""
    return [each for each in ratios(result) if each.of["competitor"] == OURS and each.value < 1 / FASTER]


def limit_us(row: Row, ceilings: Row) -> float:
    """The least time that this machine's ceilings allow for a layer in its dtype.

    Of arithmetic and, where the weight comes from memory (several copies in turn), of its packed bytes, x and y.
    """
    peak = ceilings.get("fma_float32_gflops") or ceilings["mm_float32_gflops"]
    peak = max(peak, ceilings["mm_float32_gflops"])
    if row["dtype"] == "bfloat16":
        peak = max(ceilings["mm_bfloat16_gflops"], peak if "fma_float32_gflops" in ceilings else 0.0)
    size = 2 if row["dtype"] == "bfloat16" else 4
    moved = row["packed_bytes"] + size * row["rows"] * (row["in_features"] + row["out_features"])
    memory = moved / ceilings["copy_gb_s"] / 1e3 if row["weight_copies"] > 1 else 0.0
    return max(row["flop"] / peak / 1e3, memory, ceilings["launch_us"] if "fma_float32_gflops" not in ceilings else 0)


# Tables -------------------------------------------------------------------------------------------------------------


def overview(result: Row) -> list[Table]:
    """One line a case, for a terminal; then where harlora loses, and what was not measured."""
    first = _leads("Times faster", result, "encoder", "step", "layer")
    return [*first, *(table for table in tables(result) if table.title in {LOST, FAILED})]


def tables(result: Row) -> list[Table]:
    """Everything that was measured: whole models, layers, distance to the limit, losses, memory, what failed."""
    made = _leads("Whole models: times faster", result, "encoder", "step")
    groups: dict[tuple[Any, ...], dict[tuple[int, int], dict[int, Mapping[str, Row]]]] = {}
    for rows in cases(result, "layer").values():
        row = next(iter(rows.values()))
        shape, kind = (row["in_features"], row["out_features"]), (row["direction"], row["dtype"], row["rank"])
        groups.setdefault(kind, {}).setdefault(shape, {})[row["rows"]] = rows
    for (direction, dtype, rank), shapes in groups.items():
        counts = sorted({count for by_rows in shapes.values() for count in by_rows})
        for over, of in COMPARED:
            body = [
                [_shape(shape), *(_cell(by_rows.get(count, {}), over, of) for count in counts)]
                for shape, by_rows in shapes.items()
            ]
            if any(text not in {"", "–"} for line in body for text in line[1:]):
                title = f"One layer, {direction}, {dtype}, rank {rank}: {of}, times faster than {over}"
                made.append(Table(title, ["in→out", *(f"M = {count}" for count in counts)], body))
        if direction == "forward" and result["ceilings"]:
            for name in (OURS, PEER):
                body = [
                    [_shape(shape), *(_share(by_rows.get(count, {}).get(name), result["ceilings"]) for count in counts)]
                    for shape, by_rows in shapes.items()
                ]
                title = f"Share of the speed that the ceilings allow, {direction}, {dtype}, rank {rank}: {name}"
                made.append(Table(title, ["in→out", *(f"M = {count}" for count in counts)], body))
    lost = [
        [where(each.facts), each.over["competitor"], each.text, f"{each.of['relative_error']:.0e}",
         f"{each.over['relative_error']:.0e}"]
        for each in losses(result)
    ]  # fmt: skip
    heads = ["case", "faster", "its time / harlora's", "harlora's error", "its error"]
    made.append(Table(LOST, heads, lost))
    body = [
        [where(rows[OURS]), *(_bytes(rows.get(name, {}).get("peak_bytes")) for name in (OURS, *OTHERS))]
        for rows in cases(result, "encoder", "step").values()
        if OURS in rows
    ]
    made.append(_without_empty(Table("Most bytes held at once, whole models", ["", OURS, *OTHERS], body)))
    body = [
        [where(row), row["competitor"], _bytes(row.get("extra_native_bytes")), _bytes(row.get("extra_torch_bytes"))]
        for row in result["rows"]
        if row["case"] == "memory" and row["status"] == "ok"
    ]
    heads = ["one step", "", "beyond what any layer needs, resident", "through torch"]
    made.append(Table("Peak memory of one layer's step in a fresh process", heads, body))
    if any("joules" in row for row in result["rows"]):
        body = [
            [where(row), row["competitor"], f"{1e3 * row['joules']:.3g}"] for row in result["rows"] if "joules" in row
        ]
        made.append(Table("Energy of a call, mJ", ["case", "competitor", "mJ"], body))
    body = [
        [f"{each['title']}, {'→'.join(map(str, each['shape']))}, {each['rows']} rows", _way(name), f"{taken:.1f}",
         f"{taken / each['times_us'][each['table']]:.2f}" if each["table"] in each["times_us"] else "",
         "yes" if name == each["table"] else ""]
        for each in result.get("ways", ()) for name, taken in each["times_us"].items()
    ]  # fmt: skip
    heads = ["call", "way", "µs", "over the table's", "in the table"]
    made.append(Table("Ways of CUDA C++ against the table's, captured", heads, body))
    failed: dict[tuple[str, str], list[str]] = {}
    for row in result["rows"]:
        if row["status"] != "ok":
            failed.setdefault((row["competitor"], row["status"]), []).append(where(row))
    body = [
        [name, status, places[0] if len(places) == 1 else f"{len(places)} cases, first {places[0]}"]
        for (name, status), places in failed.items()
    ]
    made.append(Table(FAILED, ["competitor", "why", "where"], body))
    return [table for table in made if table.body]


def _way(name: str) -> str:
    """A configuration's way, and its tile of rows where that is all there is to it."""
    found = re.search(r"way='(\w+)', block_rows=(\d+), block_out=(\d+)(?:.*parts=(\d+))?", name)
    if found is None:
        return name
    way, rows, out, parts = found.groups()
    text = way if rows == "0" else f"{way} {rows}" if out == "0" else f"{way} {rows}×{out}"
    return text if parts in (None, "0") else f"{text} in {parts}"


def _leads(title: str, result: Row, *kinds: str) -> list[Table]:
    body = [
        [where(rows[OURS]), _time(rows[OURS]), *(_cell(rows, over, of) for over, of in COMPARED)]
        for rows in cases(result, *kinds).values()
        if OURS in rows
    ]  # fmt: skip
    heads = ["case", OURS, *(f"over {name}" for name in OTHERS), *(f"{of} over {over}" for over, of in OF_VARIANTS)]
    return [_without_empty(Table(title, heads, body))] if body else []


def summary(result: Row) -> list[str]:
    """What it comes to, in sentences: wins, losses, spread, who was disturbed."""
    lines = []
    for over in COMPETITORS:
        values = [each for each in ratios(result) if each.of["competitor"] == OURS and each.over["competitor"] == over]
        if not values or over == "dense":
            continue
        won = sum(each.value > FASTER for each in values)
        lost = sum(each.value < 1 / FASTER for each in values)
        mean = statistics.geometric_mean([each.value for each in values])
        lines.append(
            f"Over {over}: faster in {won}, slower in {lost}, equal within 3 % in {len(values) - won - lost} of "
            f"{len(values)} cases; {mean:.2f} times as fast in the geometric mean."
        )
    everything = ratios(result)
    noisy = sum(each.noisy for each in everything)
    if noisy:
        lines.append(
            f"{noisy} of {len(everything)} ratios are marked {MARK}: from round to round they spread by more than "
            f"{WIDE:.0%} between the 20th and 80th percentile, or too few rounds met the machine in its usual state."
        )
    least = result["method"].get("least_rounds", 0)
    rounds = [row["rounds"] + row.get("rounds_left_out", 0) for row in result["rows"] if "rounds" in row]
    if few := sum(count < least for count in rounds):
        lines.append(
            f"{few} of {len(rounds)} rows have fewer than the {least} rounds that were meant, the fewest {min(rounds)}:"
            " there was no time for more."
        )
    state = result.get("machine", {})
    if state.get("usual", 1.0) < 1:
        lines.append(
            f"In {1 - state['usual']:.1%} of {state['looks']} looks the cores were slower, or farther from each other,"
            f" than usual on this machine; samples taken then do not count.{_left_out(result)}"
        )
    taken = result["provenance"].get("taken_by_others", 0.0)
    if taken > BUSY:
        lines.append(f"NOT A MEASUREMENT: other processes took {taken:.0%} of the cores; repeat it on a quiet machine.")
    if not result["complete"]:
        why = f" ({result['failed']})" if result.get("failed") else ""
        lines.append(f"The run did not finish{why}; what is missing was not measured.")
    return lines


def _left_out(result: Row) -> str:
    """How much longer calls took in the states that do not count, harlora's and the baseline's over the same cases."""
    both = [
        [rows[name]["left_out_us"] / rows[name]["median_us"] for name in (OURS, PEER)]
        for rows in cases(result, "encoder", "step", "layer").values()
        if all(rows.get(name, {}).get("left_out_us") for name in (OURS, PEER))
    ]
    if not both:
        return ""
    mine, theirs = (statistics.geometric_mean(values) for values in zip(*both, strict=True))
    return f" They took {mine:.2f} times as long with {OURS}, {theirs:.2f} with {PEER} (the mean of {len(both)} cases)."


def setting(result: Row) -> str:
    """Where and with what it was measured, in one paragraph."""
    facts, rates = result["provenance"], result["ceilings"]
    ours, peer = result["competitors"][OURS], result["competitors"][PEER]
    versions = [f"torch {facts['versions']['torch']}"]
    for participant in result["competitors"].values():
        for package, number in participant["versions"].items():
            if number and f"{package} {number}" not in versions:
                versions.append(f"{package} {number}")
    text = f"Measured with `{facts['command']}` at commit {(facts['commit'] or 'unknown')[:7]}"
    text += f"{' (changed)' if facts['dirty'] else ''}, {facts['time']}: {facts['device']}"
    if facts["device_type"] == "cpu":
        flags = ", ".join(flag for flag in facts["cpu_flags"] if flag != "fma")
        text += f" ({flags}), {facts['threads']} threads"
        text += f"; bitsandbytes computes in {peer['cpu_kernel']}" if "cpu_kernel" in peer else ""
    else:
        text += f", driver {facts['gpu'].get('driver_version', 'unknown')}, CUDA {facts['versions']['cuda']}"
    tuned = ", by a table that was measured there" if facts.get("tuned") else ""
    text += f"; kernels of harlora: {ours['kernel']}{tuned}; {', '.join(versions)}."
    text += f" Others took {facts.get('taken_by_others', 0):.1%} of the cores meanwhile."
    if rates:
        fma = f"{rates['fma_float32_gflops']:.0f} GFLOP/s of float32 FMA, " if rates.get("fma_float32_gflops") else ""
        text += (
            f" Ceilings: {fma}torch.mm {rates['mm_float32_gflops']:.0f} GFLOP/s in float32 and "
            f"{rates['mm_bfloat16_gflops']:.0f} in bfloat16, {rates['copy_gb_s']:.0f} GB/s copied, an operator on one "
            f"value {rates['launch_us']:.1f} µs."
        )
    if handover := result.get("machine", {}).get("handover_ns"):
        text += f" A cache line passes from core to core in {handover:.0f} ns."
    return text


def _cell(rows: Mapping[str, Row], over: str, of: str = OURS) -> str:
    found = ratio(rows, over, of)
    if found is not None:
        return found.text
    if over not in rows or of not in rows:
        return ""
    bad = rows[over] if "median_us" not in rows[over] else rows[of]
    if bad["status"].startswith(("not installed", "left out")):
        return ""
    return "–" if bad["status"] == "ok" else "fails"


def _share(row: Row | None, ceilings: Row) -> str:
    if row is None or "median_us" not in row:
        return ""
    return f"{limit_us(row, ceilings) / row['median_us']:.0%}"


def _time(row: Row) -> str:
    if "median_us" not in row:
        return "–"
    value = row["median_us"]
    return f"{value:.1f} µs" if value < 1e3 else f"{value / 1e3:.2f} ms" if value < 1e6 else f"{value / 1e6:.2f} s"


def _bytes(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**20:.1f} MiB" if abs(value) >= 2**20 else f"{value / 2**10:.0f} KiB"


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]}→{shape[1]}"


def _without_empty(table: Table) -> Table:
    kept = [i for i in range(len(table.heads)) if i == 0 or any(line[i] for line in table.body)]
    return Table(table.title, [table.heads[i] for i in kept], [[line[i] for i in kept] for line in table.body])


# Pages --------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .3rem 0 1.6rem; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left } th { vertical-align: bottom }
h2 { margin-top: 2rem } h3 { margin-bottom: 0; font-size: 15px }
img { max-width: 100%; display: block; margin: 1rem 0 } .warning { color: #b00020; font-weight: bold }
.scroll { overflow-x: auto } dt { font-weight: bold }
"""


def write_page(result: Row, folder: Path) -> Path:
    """One HTML file with everything in it, pictures too; the pictures lie beside it as well. Returns its path."""
    from harlora.bench.plots import draw  # matplotlib is needed for pictures alone

    parts = [f"<p>{escape(setting(result))}</p>", "<ul>"]
    for line in summary(result):
        kind = ' class="warning"' if line.startswith(("NOT", "The run")) else ""
        parts.append(f"<li{kind}>{escape(line)}</li>")
    parts.append("</ul>")
    for title, file in draw(result, folder):
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/png;base64,{data}">')
    parts.append("<h2>Tables</h2>")
    for table in tables(result):
        parts.append(f'<h3>{escape(table.title)}</h3><div class="scroll"><table><tr>')
        parts.append("".join(f"<th>{escape(head)}</th>" for head in table.heads) + "</tr>")
        parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in table.body]
        parts.append("</table></div>")
    parts.append("<h2>Competitors</h2><dl>")
    for name, facts in result["competitors"].items():
        versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items() if number)
        more = [text for text in (versions, facts.get("absent", "")) if text]
        parts.append(f"<dt>{escape(name)}</dt><dd>{escape('; '.join([facts['title'], *more]))}</dd>")
    parts.append("</dl><h2>Method</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(str(text))}</dd>" for name, text in result["method"].items()]
    parts.append("</dl>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>harlora bench</title><style>{_STYLE}</style>'
    write_text(folder / PAGE, f"{head}<h1>harlora bench</h1>{''.join(parts)}</html>\n")
    return folder / PAGE


def markdown(table: Table) -> str:
    """A table under its title, numbers to the right."""
    rule = ["---", *["---:"] * (len(table.heads) - 1)]
    lines = "\n".join("| " + " | ".join(line) + " |" for line in (table.heads, rule, *table.body))
    return f"**{table.title}**\n\n{lines}"


def write_document(results: Path, document: Path) -> None:
    """The newest result of each folder and device, into ``document`` between its markers, with pictures.

    Raises: InputError if there is none, or the document has no markers.
    """
    from harlora.bench.plots import draw

    text = document.read_text(encoding="utf-8") if document.exists() else ""
    if not MARKED.search(text):
        raise InputError(f"{document} has no <!-- measured --> … <!-- /measured -->")
    newest: dict[tuple[str, str], tuple[str, Path, Row]] = {}
    for file in sorted(results.glob("*/*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if (found.get("bench"), found.get("format")) != ("harlora", FORMAT):
            continue
        of, made = (file.parent.name, found["provenance"]["device"]), found["provenance"]["time"]
        if of not in newest or made > newest[of][0]:
            newest[of] = made, file, found
    if not newest:
        raise InputError(f"{results}: no result of `harlora bench` in its folders")
    parts = []
    for (folder, device), (_, file, result) in sorted(newest.items(), key=lambda item: item[1][0], reverse=True):
        kind = {"cpu": "CPU", "gpu": "GPU"}.get(folder, folder)
        parts.append(f"## {kind}: {device}\n\n{setting(result)}")
        parts.append(f"Every row: [`{file.name}`](../{file.as_posix()}).")
        parts.append("\n".join(f"- {line}" for line in summary(result)))
        for title, picture in draw(result, document.parent / "images", prefix=f"{file.stem}-"):
            parts.append(f"![{title}](images/{picture.name})")
        for alike, some in itertools.groupby(tables(result), lambda table: table.title.startswith(LAYERS)):
            texts = [markdown(table) for table in some]
            if alike:
                texts = [f"<details><summary>{len(texts)} tables of single layers</summary>", *texts, "</details>"]
            parts += texts
    made = "\n\n".join(parts) + "\n"
    write_text(document, MARKED.sub(lambda match: f"{match[1]}{made}{match[2]}", text))


# Comparison ---------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """A competitor's time in a case, new over old, each divided by what other libraries took there in the same run.

    beyond_noise: the 20th to 80th percentiles do not overlap, and the change is above 3 %.
    """

    where: str
    competitor: str
    value: float
    beyond_noise: bool


def changes(old: Row, new: Row) -> list[Change]:
    """What changed between two results in the cases that both have, largest first.

    A machine that was slower as a whole would show in every row. So times are divided by what the other libraries'
    took in both runs, their geometric mean over the case.
    """
    before, after = (cases(result, "encoder", "step", "layer") for result in (old, new))
    found = []
    for case, rows in after.items():
        peers = [
            name
            for name, row in rows.items()
            if not name.startswith(OURS) and "median_us" in row and "median_us" in before.get(case, {}).get(name, {})
        ]
        for name, row in rows.items():
            past = before.get(case, {}).get(name, {})
            if "median_us" not in row or "median_us" not in past:
                continue
            others = [peer for peer in peers if peer != name]
            drift = (
                statistics.geometric_mean(
                    [rows[peer]["median_us"] / before[case][peer]["median_us"] for peer in others]
                )
                if others
                else 1.0
            )
            value = row["median_us"] / past["median_us"] / drift
            apart = row["p20_us"] / drift > past["p80_us"] or row["p80_us"] / drift < past["p20_us"]
            found.append(Change(where(row), name, value, apart and not 1 / FASTER < value < FASTER))
    return sorted(found, key=lambda change: -abs(change.value - 1))


def comparison(old: Row, new: Row) -> list[Table]:
    """The changes beyond the noise, and how many ratios agree within 10 %."""
    found = changes(old, new)
    body = [
        [each.where, each.competitor, f"{each.value:.2f}", "slower" if each.value > 1 else "faster"]
        for each in found
        if each.beyond_noise
    ]
    made = [Table("Changes beyond the noise: time, new / old", ["case", "competitor", "new / old", ""], body)]
    before = {(key(each.of), each.of["competitor"], each.over["competitor"]): each.value for each in ratios(old)}
    pairs = [
        each.value / before[name]
        for each in ratios(new)
        if (name := (key(each.of), each.of["competitor"], each.over["competitor"])) in before
    ]
    agree = sum(1 / 1.1 <= value <= 1.1 for value in pairs)
    share = f"{agree} of {len(pairs)}" + (f" ({agree / len(pairs):.0%})" if pairs else "")
    made.append(Table("Ratios that both results have", ["", "count"], [["agree within 10 %", share]]))
    states = [
        [name, *(f"{state[key]:.0f}" for state in (old["machine"], new["machine"]))]
        for name, key in (("GFLOP/s of the slowest core", "gflops"), ("handover from core to core, ns", "handover_ns"))
        if key in old.get("machine", {}) and key in new.get("machine", {})
    ]
    made.append(Table("Usual state of the machine", ["", "old", "new"], states))
    return [table for table in made if table.body]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    write_document(Path(sys.argv[1]), Path(sys.argv[2]))
