"""Studies: many trials on Optuna's ask and tell, killed, resumed and joined at any time.

`plan` says what a study is, `space` what it searches, `samplers` how points are drawn, `storage` where trials are
kept, `claims` which process runs which trial, `run` the processes, `early_stopping` when a trial is given up,
`progress` what a person sees. They know nothing of training: a job is any function of a `Running` trial. `sweeper`
makes all this what `nas-gate search --multirun` does. Only this package and the command line import Optuna or Hydra.
"""
