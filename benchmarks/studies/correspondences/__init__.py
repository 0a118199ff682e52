"""The correspondences of predictive coding, flows and the brain, each as a number and a figure.

    python -m benchmarks.studies.correspondences

makes all of them on one core in a few minutes, from data that packages ship.
``docs/correspondences.md`` says what each is evidence for.
"""
