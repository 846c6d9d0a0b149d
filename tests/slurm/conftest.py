"""The scenes of ``scenes.py``, played once for all tests (and for all workers of a parallel session)."""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil

import pytest

from tests.slurm.cluster import Cluster, unavailable
from tests.slurm.scenes import SCENES, Played, play
from tests.slurm.trainings import Trainings, write_digits


@pytest.fixture(scope="session")
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """What became of each scene that a selected test asks for by ``@pytest.mark.scene(name)``.

    They take minutes, and a machine that is busy makes daemons miss each other: played where ``QTRAIN_REQUIRE_SLURM=1``
    asks for them, and a failure then where there can be no SLURM.
    """
    if os.environ.get("QTRAIN_REQUIRE_SLURM") != "1":
        pytest.skip("QTRAIN_REQUIRE_SLURM=1 plays the scenes on a SLURM cluster of the tests' own, in some minutes")
    if (reason := unavailable()) is not None:
        pytest.fail(reason)
    asked = {name for item in request.session.items for mark in item.iter_markers("scene") for name in mark.args}
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    folder = folder / "slurm"
    folder.mkdir(exist_ok=True)
    kept = folder / "played.pickle"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first worker that comes plays, the others wait
        if not kept.exists():
            write_digits(folder / "digits")
            with Cluster() as cluster:
                done = play(Trainings(cluster, folder), [name for name in SCENES if name in asked])
                shutil.copytree(cluster.folder / "log", folder / "log")  # to be read when a scene has failed
            kept.write_bytes(pickle.dumps(done))
    played: dict[str, Played] = pickle.loads(kept.read_bytes())
    return played


@pytest.fixture
def played(request: pytest.FixtureRequest, scenes: dict[str, Played]) -> Played:
    """What became of the test's own scene."""
    (name,) = next(request.node.iter_markers("scene")).args[:1]
    return scenes[name]


@pytest.fixture
def undisturbed(scenes: dict[str, Played]) -> Played:
    """The run on two nodes to which nothing happened."""
    return scenes["undisturbed"]
