"""Options of `pytest benchmarks`."""


def pytest_addoption(parser):
    parser.addoption(
        "--compiled",
        action="store_true",
        help="time torch.compile of the reference on a CPU too, where compiling takes minutes",
    )
