"""`mediation bench planted`: organisms of many families and seeds, one after the other, each kept in a file.

1. For every seed and every world that the families need: make the organism (`organisms`), check it causally. One that
   fails is reported and not scored.
2. Score each family that it serves (`scores`). Model and scores are kept in `WORK/WORLD-SEED/`, a file for each family
   in one rename. What is there is not made again, so a killed run goes on and seeds can be added.
3. Sum up over seeds: mean and percentile bootstrap interval over seeds of every figure, each seed's included; the area
   under the ROC curve and the precision at 5 % false positives, of hidden use (shaped, mixed, correlated, twins, two,
   flatterer) against facts not used in the same prompts, the null prompts and the overt ones. A twin is a claim of a
   model; the attribute that is the strongest in most of its prompts must be the rule's.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from mediation.errors import MediationError
from mediation.facts import FactSettings
from mediation.planted.organisms import Trained, activations, causal_check, train, train_dictionaries, train_meta
from mediation.planted.scores import Subject, readings, score
from mediation.planted.worlds import FAMILIES, SERVED_BY, Size, World, make_world, prompt_rows, size_of
from mediation.statistics import bootstrap_interval
from mediation.subject import SubjectModel

COMPARED_IN = ("shaped", "mixed", "correlated", "twins", "flatterer", "names")  # families with baselines
CONTROLS = 399  # enough for the few claims of a planted world
FORMAT = 1  # of an organism's file; raise it when scores change their meaning
FALSE_POSITIVES = 0.05

Show = Callable[[str, int, int], None]


def bench(
    families: Sequence[str], seeds: Sequence[int], work: Path, *, quick: bool = False,
    show: Show = lambda stage, done, of: None,
) -> dict[str, Any]:  # fmt: skip
    """Steps 1 to 3; `show` is called with (stage, done, of)."""
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise MediationError(f"There is no family '{', '.join(unknown)}'; choose among {', '.join(FAMILIES)}.")
    if not seeds:
        raise MediationError("There is no seed in that range; give --seeds FIRST-LAST, such as 100-102.")
    worlds = list(dict.fromkeys(world for name in families for world in SERVED_BY[name]))
    jobs = [(world, seed) for seed in seeds for world in worlds]
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MediationError(f"{work} cannot be written ({error.strerror}); choose another --work.") from error
    organisms = []
    for number, (world, seed) in enumerate(jobs):
        wanted = [name for name in FAMILIES if world in SERVED_BY[name] and name in families]

        def say(text: str, at: str = f"{world} {seed}", number: int = number) -> None:
            show(f"{at}: {text}", number, len(jobs))

        organisms.append(_organism(work, world, seed, size_of(world, quick=quick), wanted, say))
    return {
        "families": {name: _family(name, organisms) for name in families},
        "evidence": _pooled(organisms),
        "organisms": [{k: v for k, v in each.items() if k != "families"} for each in organisms],
        "seeds": list(seeds), "quick": quick, "threads": torch.get_num_threads(),
    }  # fmt: skip


def seed_range(text: str) -> range:
    """Of "100-102", or of one number."""
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        raise MediationError(f"'{text}' is no range of seeds; give FIRST-LAST, such as 100-102.")
    return range(int(first), int(last or first) + 1)


def _organism(
    work: Path, name: str, seed: int, size: Size, families: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Steps 1 and 2."""
    folder = work / f"{name.replace(' ', '-')}-{seed}"
    world = make_world(name, seed, size)
    result = _read(folder / "organism.json", size)
    if result is None:
        folder.mkdir(exist_ok=True)
        started = time.perf_counter()
        made = train(world, lambda done, of: say(f"training, step {done} of {of}"))
        made.save(folder / "model")
        result = {
            "world": name, "seed": seed, "check": causal_check(world, made),
            "seconds": round(time.perf_counter() - started, 1), "commit": _commit(),
        }  # fmt: skip
        _write(folder / "organism.json", result, size)
    scored = {family: _read(folder / f"{family}.json", size) for family in families}
    missing = [family for family, found in scored.items() if found is None]
    if missing and result["check"]["passed"]:
        for family, found in _scores(world, folder / "model", missing, say):
            scored[family] = found
            _write(folder / f"{family}.json", found, size)
    return result | {"families": {family: found for family, found in scored.items() if found is not None}}


def _read(file: Path, size: Size) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        same = kept["format"] == FORMAT and kept["size"] == vars(size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MediationError(f"{file} is not an organism's file; delete it or choose another --work.") from error
    if not same:
        raise MediationError(f"{file} was made with other settings; delete it or choose another --work.")
    return kept["result"]


def _write(file: Path, result: dict[str, Any], size: Size) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"format": FORMAT, "size": vars(size), "result": result}) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _commit() -> str | None:
    """Of the code, where it runs from a git checkout."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _scores(
    world: World, folder: Path, families: list[str], say: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each family's scores, as they come."""
    say("dictionaries")
    found = activations(world, Trained.load(folder, world))
    with tempfile.TemporaryDirectory() as scratch:
        dictionaries = train_dictionaries(world, found, Path(scratch), wide="overt" in families)
    meta = train_meta(world, dictionaries["narrow"], found)
    model = SubjectModel.load(folder, device="cpu")
    for family in families:
        dictionary = dictionaries["wide" if family == "overt" else "narrow"]
        started, done = time.perf_counter(), count(1)

        def tick(family: str = family, done: Iterator[int] = done) -> None:
            say(f"{family}, prompt {next(done)}")

        subject = Subject(model, world, dictionary, meta, found)
        rows, settings = prompt_rows(world, family, world.seed), FactSettings(seed=world.seed, controls=CONTROLS)
        scored = score(
            subject, rows, settings, tick, compare=family in COMPARED_IN, calibrate=family == "null"
        )  # fmt: skip
        if family == "names":
            for name, turned in (("readings", False), ("readings turned", True)):
                other = replace(subject, meta=readings(subject, turned=turned))
                scored[name] = score(other, rows, settings, tick, compare=False, calibrate=False)
        seconds = round(time.perf_counter() - started, 1)
        about: dict[str, Any] = {"latents_on": _latents_on(dictionary.encode(found.x)), "meta_latents": meta.d_meta}
        if world.name == "names":  # elsewhere always
            about["factored"] = "attribute" in meta.metadata
        yield family, scored | about | {"seconds": seconds, "commit": _commit()}


def _latents_on(latents: torch.Tensor) -> float:
    return float((latents != 0).float().sum(dim=1).mean())


def _family(name: str, organisms: list[dict[str, Any]]) -> dict[str, Any]:
    """Step 3: every figure of a family, over the seeds whose organisms passed; twins count by seed too."""
    by_seed: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for each in organisms:
        if name in each["families"]:
            by_seed[each["seed"]].append(each["families"][name])
    made = [each for each in organisms if each["world"] in SERVED_BY[name]]
    result: dict[str, Any] = {
        "organisms": len(made),
        "passed": sum(each["check"]["passed"] for each in made),
        "seeds": sorted(by_seed),
        "prompts": sum(one["prompts"] for each in by_seed.values() for one in each),
        "evaluation_prompts": sum(one["evaluation"] for each in by_seed.values() for one in each),
    }
    if not by_seed:
        return result
    per_seed = [list(map(_flat, each)) for each in by_seed.values()]
    keys = list(dict.fromkeys(key for each in per_seed for one in each for key in one))
    result["figures"] = {key: _over_seeds([_mean([one.get(key) for one in each]) for each in per_seed]) for key in keys}
    tests = [test for each in by_seed.values() for one in each for test in one["tests"]]
    for key in ("p", "size"):
        result[key] = [value for each in by_seed.values() for one in each for value in one.get(key, [])]
    result["tests"] = len(tests)
    result["q_flagged"] = sum(test["q"] <= FactSettings().alpha for test in tests)
    roc = [point for each in by_seed.values() for one in each for point in one["evidence"]]
    result["roc"] = _roc(roc)
    return result


def _flat(one: dict[str, Any]) -> dict[str, float | None]:
    """An organism's figures by name: `naming.attribute`, `compared.matching pursuit.value`, ..."""
    found: dict[str, float | None] = {f"naming.{k}": v for k, v in one["naming"].items()}
    found |= {f"flags.{k}": v for k, v in one["flags"].items()}
    for way, figures in one.get("compared", {}).items():
        found |= {f"compared.{way}.{k}": v for k, v in figures.items()}
    found |= {f"switch.{k}": v for k, v in one.get("switch", {}).items()}
    for way in ("readings", "readings turned"):
        if way in one:
            found |= {f"{way}.{k}": v for k, v in _flat(one[way]).items()}
    found |= {key: float(one[key]) for key in ("labels", "factored") if key in one}
    return found | {"chance": one["chance"]}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _over_seeds(values: list[float | None]) -> dict[str, Any]:
    """Mean over seeds, its bootstrap interval over seeds, and each seed's."""
    known = [value for value in values if value is not None]
    if not known:
        return {"value": None, "low": None, "high": None, "by_seed": values}
    low, high = bootstrap_interval(known)
    rounded = [None if v is None else round(v, 4) for v in values]
    return {"value": float(np.mean(known)), "low": float(low), "high": float(high), "by_seed": rounded}


def _pooled(organisms: list[dict[str, Any]]) -> dict[str, Any]:
    """Step 3: hidden use against everything that is not; the overt facts are used, and not hidden."""
    points: list[list[float]] = []
    for each in organisms:
        for family, one in each["families"].items():
            points += [[s, 0.0] if family == "overt" else [s, used] for s, used in one["evidence"]]
    return _roc(points)


def _roc(points: list[list[float]]) -> dict[str, Any]:
    """Area, precision and recall at FALSE_POSITIVES, and how many of each kind; None without both kinds."""
    if not points or len({used for _, used in points}) < 2:
        return {"area": None, "precision": None, "recall": None, "used": 0, "unused": len(points)}
    scores, used = map(np.array, zip(*points, strict=True))
    false, true, _ = roc_curve(used, scores)
    at = int((false <= FALSE_POSITIVES).nonzero()[0][-1])
    hits, misses = true[at] * used.sum(), false[at] * (1 - used).sum()
    return {
        "area": float(roc_auc_score(used, scores)), "precision": float(hits / max(hits + misses, 1)),
        "recall": float(true[at]), "used": int(used.sum()), "unused": int((1 - used).sum()),
    }  # fmt: skip


def uniform(p: Sequence[float]) -> float:
    """p-value of Kolmogorov's test that `p` is uniform."""
    return float(stats.kstest(p, "uniform").pvalue)
