"""Studies: one question each, with a protocol of its own and committed records.

A study is a module with a command line, ``python -m benchmarks.studies.<name>``.
"""
