"""The pieces of `benchmarks/serving.py`: processes, clients, and one module for each thing that is measured."""
