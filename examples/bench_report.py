"""Turn the rows that selectors_bench.py measured into a page."""

from pathlib import Path

import numpy as np

PAGES = Path(__file__).parent
SAMPLES = 2000
DEFAULT = "blend, first layer"
STATIC_UNSEEN = "others, first layer"
ONE_TOKEN = ("boolq",)  # answers of one token say too little for a mean

Rows = dict[str, dict[str, dict[int, dict[str, float]]]]


def by_setting(lines: list[dict]) -> Rows:
    """Return setting → family → row → metrics, for rows that every setting has."""
    found: Rows = {}
    for line in lines:
        families = found.setdefault(line["setting"], {})
        families.setdefault(line["family"], {})[line["row"]] = line
    for family in {line["family"] for line in lines}:
        common = set.intersection(*(set(s.get(family, {})) for s in found.values()))
        for families in found.values():
            families[family] = {n: families[family][n] for n in sorted(common)}
    return found


def macro(families: dict[str, dict[int, dict[str, float]]], metric: str) -> float:
    """Return the mean over rows, then over families."""
    return float(
        np.mean(
            [
                np.mean([row[metric] for row in rows.values()])
                for name, rows in families.items()
                if name not in ONE_TOKEN
            ]
        )
    )


def interval(a: dict, b: dict, metric: str = "kl") -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of ``a`` minus ``b``, over prompts."""
    rng = np.random.default_rng(0)
    means = np.zeros(SAMPLES)
    names = [name for name in a if name not in ONE_TOKEN]
    for name in names:
        difference = np.array(
            [a[name][n][metric] - b[name][n][metric] for n in a[name]]
        )
        picks = rng.integers(0, len(difference), (SAMPLES, len(difference)))
        means += difference[picks].mean(axis=1) / len(names)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def write_report(model: str, keep: float, lines: list[dict]) -> Path:
    """Write examples/selectors-MODEL-KEEP.md and return it."""
    settings = by_setting(lines)
    ranked = sorted(settings, key=lambda name: macro(settings[name], "kl"))
    families = sorted(settings[DEFAULT])
    counts = {name: len(settings[DEFAULT][name]) for name in families}
    text = [
        f"# Ways of selecting, {model}, keep {keep:.3g}",
        "",
        "Made by `python examples/selectors_bench.py`; rows: "
        + ", ".join(f"{name} {count}" for name, count in counts.items())
        + ". Means over rows, then over families, those with answers of one token "
        f"({', '.join(ONE_TOKEN)}) left out. The intervals are 95 % of a paired "
        "bootstrap over prompts: they do not cover another model or other families.",
        "",
        "| scores, allocation, compensation | KL | NLL | agreement | KL − default | KL − unseen static |",
        "|---|---|---|---|---|---|",
    ]
    for name in ranked:
        found = settings[name]
        cells = [f"{macro(found, m):.3f}" for m in ("kl", "nll")]
        cells += [f"{macro(found, 'agreement'):.1%}"]
        cells += [
            "" if name == other else "[{:+.2f}, {:+.2f}]".format(*interval(found, to))
            for other in (DEFAULT, STATIC_UNSEEN)
            for to in [settings[other]]
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    text += ["", "KL by family:", "", "| | " + " | ".join(families) + " |"]
    text.append("|---" * (len(families) + 1) + "|")
    for name in ranked:
        means = [
            f"{np.mean([r['kl'] for r in settings[name][f].values()]):.2f}"
            for f in families
        ]
        text.append(f"| {name} | " + " | ".join(means) + " |")
    page = PAGES / f"selectors-{model}-{keep:.3g}.md"
    page.write_text("\n".join(text) + "\n", encoding="utf-8")
    return page
