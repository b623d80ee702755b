"""Fixtures of the tests of lmms-eval.

A test file names this one in `pytest_plugins`, after it has skipped itself where lmms-eval is not.
"""

import lmms_task
import pytest
import torch
import transformers


@pytest.fixture
def one_thread():
    """Several only wait for one another, with models as small as these."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    """Nothing is read from the caches of the user, nor left there."""
    folder = str(tmp_path_factory.mktemp("caches"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", folder)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Of each family a folder with its model, made when it is asked for first."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = lmms_task.save_model(family, tmp_path_factory.mktemp("models") / family)
        return str(made[family])

    return folder


@pytest.fixture(scope="session")
def plain(folders):
    """A family's model outside of lmms-eval, with what is attached."""

    def plain(family="llava", **parts):
        model = transformers.AutoModelForImageTextToText.from_pretrained(folders(family)).eval()
        processor = transformers.AutoProcessor.from_pretrained(folders(family))
        return lmms_task.Plain(family, model, processor, parts)

    return plain


@pytest.fixture(scope="session")
def expected(plain):
    """The answers and lengths of each row of the paper."""
    return {name: plain(**parts).answers() for name, (_, parts) in lmms_task.ROWS.items()}


@pytest.fixture(scope="session")
def tasks(tmp_path_factory, expected):
    """The local tasks; right are the answers of the row VMTC."""
    answers = [answer.strip() for answer, _ in expected["VMTC"]]
    return lmms_task.write(tmp_path_factory.mktemp("tasks") / "local", answers)
