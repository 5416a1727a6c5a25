"""The work of a grid study: recipe x input x seed x block size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps import estimate, plan, predictions
from sweeps.calls import calls_of
from sweeps.keys import sources_hash
from sweeps.processes import Place
from sweeps.run import Progress, describe_inputs, describe_rules, run_jobs
from sweeps.store import Store
from sweeps.work import Finished, Work


def work_of(
    study: plan.Study,
    quick: bool,
    *,
    recipes: str | None = None,
    settings: list[str] | None = None,
    inputs: str | None = None,
    seeds: int | None = None,
    max_context: int | None = None,
) -> tuple[Work, list[str]]:
    """The study's work as the options change it, and notes for the user.

    Raises ValueError where the options do not fit.
    """
    import jaxattn

    names = recipes.split(",") if recipes is not None else list(study.names())
    by_name = plan.recipes_of(names, settings or [])
    sources = plan.inputs_of(study, inputs, seeds, max_context)
    labels = list(dict.fromkeys(source.label for source in sources))
    numbers = sources_hash(Path(jaxattn.__file__).parent)
    jobs = plan.jobs_of(study, by_name, sources, numbers)
    parts = [part for job in jobs for part in job.parts]

    def compute(
        store: Store,
        finished: Finished,
        origin: Mapping[str, Any],
        progress: Progress,
        place: Place,
    ) -> None:
        run_jobs(jobs, store, finished, origin, progress, place)

    def refuse(there: set[str]) -> None:
        missing = estimate.estimate(calls_of(jobs, there))
        estimate.refuse(missing, estimate.free_memory())

    work = Work(
        study=study.name,
        title=study.title,
        suffix=(*(["quick"] if quick else []), *(labels if inputs else [])),
        manifest={
            "sources": numbers,
            "recipes": {name: recipe.to_dict() for name, recipe in by_name.items()},
            "block_rules": describe_rules(by_name.values()),
            "inputs": describe_inputs(sources),
            "seeds": sorted({source.seed for source in sources}),
            "contexts": list(jobs[0].contexts),
        },
        parts=[part.describe() for part in parts],
        compute=compute,
        refuse=refuse,
        predict=lambda root, progress: predictions.add(jobs, root, progress),
    )
    return work, plan.notes_of(sources)
