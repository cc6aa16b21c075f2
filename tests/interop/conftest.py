"""What the tests against real programs share."""

import pytest

from tests.support import corpus as corpora


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, corpora.Image]:
    """Images by name; see tests/support/corpus.py. Do not change them."""
    return corpora.build(tmp_path_factory.mktemp("corpus"))
