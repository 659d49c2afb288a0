from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings

from mla_tune.errors import StoreError
from mla_tune.hardware.sku import Environment
from mla_tune.store.database import Database, EnvironmentSummary
from mla_tune.store.limit_try import Try
from mla_tune.store.measurement import Measurement, Outcome, Quarantined, Role, Stop
from mla_tune.store.migrations import known_migrations
from tests.store.strategies import (
    C4A,
    CPU_ENVIRONMENT,
    ENVIRONMENT,
    METADATA,
    NVL_ENVIRONMENT,
    disturbed,
    environments,
    export_order,
    failure,
    fixed_rows,
    fixed_tries,
    fixed_tuned,
    measurement_lists,
    timing,
    try_lists,
)

DATA = Path(__file__).with_name("data")
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def _refused(path: Path, **options: bool) -> str:
    with pytest.raises(StoreError) as refusal:
        Database.open(path, **options)
    message = str(refusal.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@settings(max_examples=30, deadline=None)
@given(environments, measurement_lists(), try_lists)
def test_a_database_gives_back_what_was_recorded_in_the_order_of_keys(
    environment: Environment, measurements: list[Measurement], tries: list[Try]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Database.open(Path(folder, "a.db")) as database:
            database.record(environment, measurements)
            database.record_tries(environment, tries)
        with Database.open(Path(folder, "a.db"), create=False) as database:
            assert database.measurements(environment.id) == export_order(measurements)
            assert database.tries(environment.id) == sorted(tries, key=lambda attempt: attempt.key)
            done = {m.key for m in measurements if m.outcome is not Outcome.DISTURBED}
            assert database.done_keys(environment.id) == done
            assert database.environments() == ([environment] if measurements or tries else [])
            assert [summary.tries for summary in database.summaries()] == [len(tries)] * len(database.environments())


def test_a_measurement_taken_again_replaces_the_first(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [timing(), timing(part="combine")])
        again = replace(failure(Outcome.CRASH, "signal 11"), candidate="sparse_fwd", part="attention")
        database.record(ENVIRONMENT, [again])
        assert database.measurements(ENVIRONMENT.id) == [again, timing(part="combine")]


def test_disturbed_samples_are_kept_for_good_and_their_timing_is_taken_again(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [disturbed("throttled: power cap", 5.0, 7.0), timing()])
        assert database.done_keys(ENVIRONMENT.id) == {timing().key}
        clean = replace(
            timing(4.0, part=disturbed().part),
            candidate=disturbed().candidate,
            quarantined=(Quarantined("another process used the GPU: pid 7", (9.0,)), Quarantined("throttled", (8.0,))),
        )
        database.record(ENVIRONMENT, [clean])
        assert database.done_keys(ENVIRONMENT.id) == {timing().key, clean.key}
        assert [(q.reason, q.samples_us) for q in database.quarantined(ENVIRONMENT.id)] == [
            ("throttled: power cap", (5.0, 7.0)),
            ("another process used the GPU: pid 7", (9.0,)),
            ("throttled", (8.0,)),
        ]
        assert {(q.site, q.shape, q.candidate, q.part, q.regime) for q in database.quarantined(ENVIRONMENT.id)} == {
            (clean.site, clean.shape, clean.candidate, clean.part, clean.regime)
        }
        assert replace(clean, quarantined=()) in database.measurements(ENVIRONMENT.id)
        assert [summary.quarantined_samples for summary in database.summaries()] == [4]
        assert database.quarantined(CPU_ENVIRONMENT.id) == []


def test_a_later_try_replaces_the_earlier_and_an_unsound_one_stores_nothing(tmp_path: Path) -> None:
    ran, failed = fixed_tries()
    with Database.open(tmp_path / "a.db") as database:
        database.record_tries(ENVIRONMENT, [ran, failed])
        again = replace(failed, outcome=Outcome.CRASH, detail="worker ended with exit code -11")
        database.record_tries(ENVIRONMENT, [again], NOON)
        assert database.tries(ENVIRONMENT.id) == [ran, again]
        for wrong in (replace(ran, detail="x"), replace(failed, detail=""), replace(failed, detail="a\nb")):
            with pytest.raises(StoreError, match="a try must be sound: indexer_metadata/c4a deep_gemm"):
                database.record_tries(ENVIRONMENT, [replace(ran, candidate="jit"), wrong])
        assert database.tries(ENVIRONMENT.id) == [ran, again]


def test_an_environment_with_tries_alone_is_listed_and_summed_up(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        database.record_tries(ENVIRONMENT, fixed_tries(), NOON)
        assert database.summaries() == [EnvironmentSummary(ENVIRONMENT, 0, (), 2, 0, NOON, NOON)]
        assert database.environments() == [ENVIRONMENT]
        assert database.measurements(ENVIRONMENT.id) == []


def test_measurements_are_read_by_site_and_environment(tmp_path: Path) -> None:
    metadata = replace(timing(), site=METADATA, candidate="jit")
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [timing(), metadata])
        database.record(CPU_ENVIRONMENT, [failure()])
        assert database.measurements(ENVIRONMENT.id, METADATA) == [metadata]
        assert database.measurements(ENVIRONMENT.id, C4A) == [timing()]
        assert database.measurements(CPU_ENVIRONMENT.id) == [failure()]
        assert database.environments() == [CPU_ENVIRONMENT, ENVIRONMENT]
        assert database.measurements("0" * 16) == []


def test_a_summary_counts_points_and_outcomes_and_spans_the_times_in_utc(tmp_path: Path) -> None:
    east = timezone(timedelta(hours=9))
    with Database.open(tmp_path / "a.db") as database:
        assert database.summaries() == []
        database.record(ENVIRONMENT, fixed_rows()[3:], NOON.astimezone(east))
        database.record(ENVIRONMENT, fixed_rows()[:3], NOON + timedelta(hours=1))
        (summary,) = database.summaries()
    counts = ((Outcome.OK, 3), (Outcome.UNSUPPORTED, 1), (Outcome.WRONG_RESULT, 1))
    assert summary == EnvironmentSummary(ENVIRONMENT, 2, counts, 0, 0, NOON, NOON + timedelta(hours=1))
    assert summary.measurements == 5


def test_a_point_never_changes_its_role_and_a_refused_batch_leaves_nothing(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [replace(timing(), role=Role.HELD_OUT)])
        new_point = replace(timing(), site=METADATA)
        for environment in (ENVIRONMENT, CPU_ENVIRONMENT):
            with pytest.raises(StoreError, match=r"must keep its role: .* is held_out in .*, got fit"):
                database.record(environment, [new_point, timing(part="combine")])
        assert [m.role for m in database.measurements(ENVIRONMENT.id)] == [Role.HELD_OUT]
        assert database.environments() == [ENVIRONMENT]


def test_an_unsound_measurement_is_refused_with_the_rest_of_its_batch(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        with pytest.raises(StoreError, match="must be sound: prefill_attention/c4a/h64/k512"):
            database.record(ENVIRONMENT, [timing(), failure(detail="")])
        assert database.done_keys(ENVIRONMENT.id) == set()


def test_a_row_that_was_edited_by_hand_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Database.open(path) as database:
        database.record(ENVIRONMENT, [timing()])
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("update measurements set outcome = 'great'")
            connection.commit()
        with pytest.raises(StoreError, match="was edited: 'great' is not a valid Outcome"):
            database.measurements(ENVIRONMENT.id)
        with pytest.raises(StoreError, match="was edited: 'great' is not a valid Outcome"):
            database.summaries()


def test_a_reader_sees_committed_points_while_a_writer_is_at_work(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as writer, Database.open(tmp_path / "a.db") as reader:
        writer.record(ENVIRONMENT, [timing()])
        writer._db.execute("begin immediate")
        assert reader.measurements(ENVIRONMENT.id) == [timing()]


def test_a_second_writer_is_told_who_holds_the_database(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    script = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("begin immediate")
print(flush=True)
sys.stdin.read()
"""
    with Database.open(path, busy_timeout_s=0.05) as database:
        holder = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with holder:
            assert holder.stdout is not None
            holder.stdout.readline()
            with pytest.raises(StoreError) as refusal:
                database.record(ENVIRONMENT, [timing()])
            holder.communicate()
        message = str(refusal.value)
        who = f"process {holder.pid}" if Path("/proc/locks").exists() else "another process"
        assert f"{path} is locked by {who}; wait until it is done or stop it" in message
        assert "\n" not in message
        database.record(ENVIRONMENT, [timing()])
        assert database.measurements(ENVIRONMENT.id) == [timing()]


def test_a_killed_writer_loses_no_committed_point_and_leaves_no_half_one(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    script = """
import sys
from dataclasses import replace
from tests.store.strategies import ENVIRONMENT, timing
from mla_tune.sites.shape import Shape
from mla_tune.store.database import Database
from mla_tune.store.measurement import Outcome, Quarantined
from mla_tune.store.limit_try import Try
database = Database.open(sys.argv[1])
spoiled = (Quarantined("throttled: power cap", (1.0,)),)
for count in range(1, 1_000_000):
    shape = Shape(1, count, 1 << 20)
    rows = [replace(timing(shape=shape, part=part), quarantined=spoiled) for part in ("a", "b", "c")]
    database.record(ENVIRONMENT, rows)
    database.record_tries(ENVIRONMENT, [Try(rows[0].site, name, shape, Outcome.OK) for name in ("x", "y")])
    print(count, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, env=environment)
    with writer:
        assert writer.stdout is not None
        while (committed := int(writer.stdout.readline())) < 20:
            pass
        writer.kill()
    assert writer.returncode == -signal.SIGKILL
    with Database.open(path, create=False) as database:
        counts = [m.shape.num_qo_tokens for m in database.measurements(ENVIRONMENT.id)]
        quarantined = [q.shape.num_qo_tokens for q in database.quarantined(ENVIRONMENT.id)]
        tried = sorted(t.shape.num_qo_tokens for t in database.tries(ENVIRONMENT.id))
    assert counts[-1] >= committed
    assert counts == quarantined == [count for count in range(1, counts[-1] + 1) for _ in "abc"]
    assert tried[-1] in (counts[-1], counts[-1] - 1)
    assert tried == [count for count in range(1, tried[-1] + 1) for _ in "xy"]


def test_a_file_that_is_not_sqlite_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    path.write_bytes(b"latency_us,12\n" * 500)
    assert "must be a SQLite file that mla-tune wrote" in _refused(path)
    assert path.read_bytes() == b"latency_us,12\n" * 500
    assert os.listdir(tmp_path) == ["a.db"]


def test_a_sqlite_file_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "studies.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table studies (id integer)")
    before = path.read_bytes()
    assert "holds other tables" in _refused(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "with a log beside it"])
def test_a_newer_database_is_refused_and_left_as_it_is(tmp_path: Path, closed: bool) -> None:
    path = tmp_path / "a.db"
    with Database.open(path) as database:
        database.record(ENVIRONMENT, fixed_rows())
    connection = sqlite3.connect(path)
    connection.execute(
        "insert into _sqlite_migrations (migration_set, name, applied_at) values ('mla_tune', 'm999_later', '')"
    )
    connection.commit()
    if closed:
        connection.close()
    names, before = sorted(os.listdir(tmp_path)), path.read_bytes()
    assert "has m999_later, known up to m" in _refused(path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names
    connection.close()


def test_a_damaged_database_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Database.open(path) as database:
        database.record(ENVIRONMENT, fixed_rows())
    data = path.read_bytes()
    path.write_bytes(data[:8192] + b"\xab" * (len(data) - 8192))
    with pytest.raises(StoreError, match=r"must be intact: .*a.db is damaged") as refusal:
        Database.open(path).measurements(ENVIRONMENT.id)
    assert "\n" not in str(refusal.value)


def test_a_database_that_was_cut_inside_a_page_is_refused_before_sqlite_fills_it_with_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with Database.open(path) as database:
        database.record(ENVIRONMENT, fixed_rows())
    path.write_bytes(path.read_bytes()[:-100])
    cut = path.read_bytes()
    assert "must be whole" in _refused(path)
    assert path.read_bytes() == cut


def test_places_where_no_database_can_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe")
    assert "must be a regular file" in _refused(tmp_path)
    assert "must be a regular file" in _refused(tmp_path / "pipe")
    assert "existing folder" in _refused(tmp_path / "missing" / "a.db")
    assert "existing folder" in _refused(tmp_path / "file" / "a.db")
    assert "File name too long" in _refused(tmp_path / ("x" * 300))


def test_reading_needs_a_database_that_exists_and_makes_none(tmp_path: Path) -> None:
    assert "must exist to be read" in _refused(tmp_path / "a.db", create=False)
    assert os.listdir(tmp_path) == []
    (tmp_path / "empty.db").write_bytes(b"")
    assert "holds no tables" in _refused(tmp_path / "empty.db", create=False)


def test_an_empty_file_that_a_crash_left_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"")
    with Database.open(tmp_path / "a.db") as database:
        assert database.environments() == []


def test_a_name_with_characters_that_mean_something_in_a_uri_is_taken_as_it_is(tmp_path: Path) -> None:
    name = "h200 50%?mode=memory#1.db"
    with Database.open(tmp_path / name) as database:
        database.record(ENVIRONMENT, [timing()])
    assert os.listdir(tmp_path) == [name]


_UNPRIVILEGED = """
import os, sys
from tests.store.strategies import ENVIRONMENT, timing
from mla_tune.errors import StoreError
from mla_tune.store.database import Database
from mla_tune.store.export import write_export
if os.geteuid() == 0:
    os.setuid(65534)
for action in (lambda: Database.open("new.db"), lambda: write_export("new.jsonl", ENVIRONMENT, [timing()])):
    try:
        action()
    except StoreError as error:
        print(error)
"""


def test_an_unwritable_folder_is_named_and_left_empty() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:  # not below pytest's own folder, which other users may not enter
        os.chmod(folder, 0o555)
        command = [sys.executable, "-c", _UNPRIVILEGED]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        assert os.listdir(folder) == []
    database, export = done.stdout.splitlines()
    assert "must be in an existing folder where files may be made: cannot open new.db" in database
    assert "must go to a folder where files may be made: cannot write new.jsonl: Permission denied" in export


_OUT_OF_ROOM = """
import resource, sys
from tests.store.strategies import ENVIRONMENT, timing
from mla_tune.errors import StoreError
from mla_tune.sites.shape import Shape
from mla_tune.store.database import Database
database = Database.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    for count in range(1, 10_000):
        database.record(ENVIRONMENT, [timing(shape=Shape(1, count, 1 << 20), part=part) for part in ("a", "b")])
        print(count, flush=True)
except StoreError as error:
    print(error)
"""


def test_running_out_of_room_is_one_line_and_keeps_what_was_committed(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _OUT_OF_ROOM, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *counts, message = done.stdout.splitlines()
    assert str(path) in message
    assert "run again, what was committed is kept" in message
    with Database.open(path, create=False) as database:
        assert len(database.measurements(ENVIRONMENT.id)) == 2 * len(counts) > 0


def test_a_full_database_is_one_line_and_the_batch_is_rolled_back(tmp_path: Path) -> None:
    with Database.open(tmp_path / "a.db") as database:
        database.record(ENVIRONMENT, [timing()])
        database._db.execute("pragma max_page_count = 1")  # SQLite takes the present size instead
        many = replace(timing(part="combine"), num_samples=100_000, samples_us=(1.0,) * 100_000)
        with pytest.raises(StoreError, match="needs room to grow"):
            database.record(ENVIRONMENT, [many])
        assert database.measurements(ENVIRONMENT.id) == [timing()]


def test_every_schema_that_ever_landed_has_its_file() -> None:
    assert [path.stem.removeprefix("schema_") for path in sorted(DATA.glob("schema_*.db"))] == [
        name.split("_")[0] for name in known_migrations()
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in DATA.glob("schema_*.db")))
def test_a_database_of_an_earlier_schema_opens_and_keeps_every_row(name: str, tmp_path: Path) -> None:
    shutil.copy(DATA / name, tmp_path / "a.db")
    with Database.open(tmp_path / "a.db", create=False) as database:
        products = [] if name < "schema_m005.db" else [NVL_ENVIRONMENT]
        assert database.environments() == [CPU_ENVIRONMENT, ENVIRONMENT, *products]
        rows = database.measurements(ENVIRONMENT.id)
        plain = [replace(row, stopped_by=None, power_capped=False, launches="") for row in rows]
        assert plain == export_order(fixed_rows())
        assert database.measurements(CPU_ENVIRONMENT.id) == [failure()]
        assert {summary.first_finished_at for summary in database.summaries()} == {NOON}
        if name != "schema_m001.db":
            assert database.tries(ENVIRONMENT.id) == fixed_tries()
            assert [entry.reason for entry in database.quarantined(ENVIRONMENT.id)] == ["throttled: power cap"]
            assert {row.stopped_by for row in rows if row.outcome is Outcome.OK} == {Stop.BUDGET}
        if name not in ("schema_m001.db", "schema_m002.db"):
            assert database.tuned(ENVIRONMENT.id) == fixed_tuned()
            assert {row.launches for row in rows} == {"", "0123456789ab"}
        database.record_tuned(ENVIRONMENT, fixed_tuned())
        database.record(ENVIRONMENT, [timing(part="combine"), disturbed()])
        database.record_tries(ENVIRONMENT, fixed_tries())
    with Database.open(tmp_path / "a.db", create=False) as database:  # migrated for good
        assert len(database.measurements(ENVIRONMENT.id)) == len(fixed_rows()) + 1
        assert database.tuned(ENVIRONMENT.id) == fixed_tuned()
        assert database.tries(ENVIRONMENT.id) == fixed_tries()
