"""Hydra's side: the sweeper that `nas-gate search --multirun` runs, and the job that a trial is.

On a cluster, N copies of one command share the study's budget. Under Slurm, with a database that all nodes reach:

    #!/bin/bash
    #SBATCH --array=0-7 --gres=gpu:1 --cpus-per-task=8
    srun nas-gate search --multirun +sweep=digits hydra.sweeper.storage=postgresql://user@host/nas_gate

A job killed at its time limit leaves its trial to the others; submitting the array again continues the study. The
trials themselves go through Hydra's launcher: with `hydra/launcher=submitit_slurm` (from hydra-submitit-launcher) each
is a Slurm job of its own, and `hydra.sweeper.n_workers=8` keeps eight in flight; early stopping, which could not reach
them, is refused.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from nas_gate.described import flat, setting_of, within
from nas_gate.errors import Refused
from nas_gate.study.context import looking_on
from nas_gate.study.early_stopping import EarlyStopping
from nas_gate.study.plan import Plan
from nas_gate.study.run import WORKER, Running, run
from nas_gate.study.space import Space, as_overrides, load_function, parse

Check = Callable[[Any], Mapping[str, Any]]
"""A trial's whole configuration, as plain values -> its settings, as JSON holds them; Refused where there are none."""

_command: list[str] = []
_check: list[Check] = []


def register(command: Sequence[str], check: Check) -> None:
    """Make the sweeper known to Hydra; `command` starts this program again."""
    _command[:], _check[:] = command, [check]
    # Hydra makes sweepers only from modules below hydra_plugins: this one goes by such a name, too, which spares
    # a second package at the top level
    Plugins.instance().register(StudySweeper)
    try:
        parent = importlib.import_module("hydra_plugins")
    except ImportError:
        parent = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    parent.nas_gate = sys.modules["hydra_plugins.nas_gate"] = sys.modules[__name__]  # type: ignore[attr-defined]


class StudySweeper(Sweeper):
    """A study; its arguments are the keys of `hydra/sweeper/nas_gate.yaml`."""

    __module__ = "hydra_plugins.nas_gate"  # see `register`

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives."""
        self._config, self._loader = config, hydra_context.config_loader
        self._launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Take part in the study until it is finished."""
        if (devices := self._config.hardware.devices) not in (1, "1"):
            raise Refused(  # the processes of a strategy start by the same command, and would be studies themselves
                f"In a study, `hardware.devices` must be 1, but is {devices!r}: more workers use more devices."
            )
        plan = plan_of(self._settings, arguments, Path(str(self._config.hydra.sweep.dir)), self._loader)
        first = plan.space.ends()[0]
        settings = flat(self._settings_of([*plan.fixed, *first], first))
        may_differ = [setting_of(key) for key in plan.may_differ]
        plan = replace(plan, settings={key: value for key, value in settings.items() if not within(key, may_differ)})

        def job(running: Running) -> Mapping[str, Any]:
            with looking_on(running.on_epoch):
                done = self._launcher.launch([list(running.overrides)], initial_job_idx=running.number)[0]
            figures: Mapping[str, Any] = done.return_value  # raises what the job has raised
            return figures

        self._refuse_what_no_trial_can_do(plan)
        run(plan, job, _command)

    def _refuse_what_no_trial_can_do(self, plan: Plan) -> None:
        config = self._loader.load_sweep_config(self._config, [*plan.fixed, *plan.space.ends()[0]])
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        if plan.early_stopping is not None and launcher != "basic":
            raise Refused(
                "`early_stopping` looks at every epoch of a trial in the study's own processes, but "
                f"hydra/launcher={launcher} runs trials elsewhere: leave one of the two out."
            )
        if plan.early_stopping is not None and config.targets is not None:
            raise Refused(
                f"`early_stopping` ends a trial for the sake of its one candidate, but targets={config.targets} asks "
                "for several: give `target` or leave early stopping out."
            )
        if WORKER not in os.environ:  # its supervisor has looked
            for overrides in plan.foreseen():
                self._settings_of(overrides, overrides[len(plan.fixed) :])

    def _settings_of(self, overrides: Sequence[str], own: Sequence[str]) -> Mapping[str, Any]:
        """The settings of a trial with these overrides; Refused names those that are the trial's own."""
        try:
            config = self._loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = 0
            HydraConfig.instance().set_config(config)  # as a launcher does, for ${hydra:...} in a configuration
            job = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            return _check[0](OmegaConf.to_container(job, resolve=True, throw_on_missing=True))
        except (Refused, HydraException, OmegaConfBaseException) as error:
            raise Refused(f"No trial can have {' '.join(own)}: {error}") from error


def plan_of(settings: Mapping[str, Any], arguments: Sequence[str], folder: Path, config_loader: Any = None) -> Plan:
    """The plan that the sweeper's settings and the command line's overrides describe."""
    given = dict(settings)
    name, path, early = given.pop("study"), given.pop("space_function"), given.pop("early_stopping")
    sampler, params = given.pop("sampler"), given.pop("params")
    may_differ = given.pop("may_differ")
    in_yaml = [
        f"{key}={value}" if isinstance(value, str) else as_overrides({key: value})[0] for key, value in params.items()
    ]
    searched, fixed = parse([*in_yaml, *arguments], config_loader)
    try:
        return Plan(
            name=str(name),
            space=Space(searched, load_function(path) if path else None, path),
            sampler=sampler["name"],
            sampler_arguments=sampler["arguments"],
            early_stopping=EarlyStopping(**early) if early is not None else None,
            enqueue=tuple(given.pop("enqueue")),
            fixed=tuple(fixed),
            may_differ=tuple(may_differ),
            folder=folder,
            **given,
        )
    except (TypeError, ValueError) as error:
        raise Refused(f"hydra.sweeper: {error}") from error
