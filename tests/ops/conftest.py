import pytest


@pytest.fixture(scope="module", autouse=True)
def compiling(quick_compiling):
    pass
