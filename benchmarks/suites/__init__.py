"""The built-in suites: a name, and the module whose `TASKS` it stands for."""

SUITES = {
    "quick": "benchmarks.suites.quick",
    "autoguides": "benchmarks.suites.autoguides",
}
