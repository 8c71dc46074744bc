"""Files of a run folder that grow, in a bucket: segments of one file, which add up to what a disk holds."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prelora_ray import run_folder
from prelora_ray.doctor import examine
from prelora_ray.monitor.tensorboard import FOLDER, TensorBoardLog
from prelora_ray.run_folder import SEGMENT_BYTES, LineWriter, RunFolder, count_segments, segment
from tests.lines import epoch_line
from tests.runs import settings


class Bucket(RunFolder):
    """A folder on a disk that is written to as a bucket is; counts what goes both ways."""

    is_local = False  # type: ignore[assignment]
    num_written = num_read = 0
    fails = False

    def write_bytes(self, name: str, content: bytes) -> None:
        self.make()
        if self.fails:
            raise OSError("503 Slow Down")
        super().write_bytes(name, content)
        self.num_written += len(content)

    def read_bytes(self, name: str) -> bytes:
        content = super().read_bytes(name)
        self.num_read += len(content)
        return content


def write(folder: RunFolder, numbers: range, bytes_of_a_line: int = 0) -> None:
    """A line at a time, as a run that uploads each epoch."""
    writer = LineWriter(folder, "epochs.jsonl")
    for number in numbers:
        writer.write(number=number, pad="x" * bytes_of_a_line)
        assert writer.flush()


def numbers(folder: RunFolder) -> list[int]:
    return [line["number"] for line in folder.read_lines("epochs.jsonl")]


def test_bytes_written_grow_with_the_epochs_and_not_with_their_square(tmp_path):
    written = []
    for epochs in (250, 500, 1000):
        folder = Bucket(tmp_path / str(epochs))
        write(folder, range(epochs), bytes_of_a_line=7000)  # as norms.jsonl has for a ViT-L
        recorded = sum(folder.list_files().values())
        assert folder.num_written <= recorded + epochs * SEGMENT_BYTES
        assert numbers(folder) == list(range(epochs))
        written.append(folder.num_written)
    assert written[2] < 2.1 * written[1] < 4.4 * written[0]


def test_a_restart_reads_nothing_and_begins_a_segment(tmp_path):
    folder = Bucket(tmp_path)
    write(folder, range(300), bytes_of_a_line=7000)
    files = len(folder.list_files())
    assert files > 5
    write(folder, range(300, 301))
    assert folder.num_read == 0
    assert numbers(folder) == list(range(301)) and len(folder.list_files()) == files + 1


@pytest.mark.parametrize("has_begun", [True, False])
def test_a_writer_that_is_not_dead_yet_overwrites_no_line_of_the_next_one(tmp_path, monkeypatch, has_begun):
    """However much both write: what it adds comes in front of that, or behind, with its own attempt."""
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 60)
    folder = Bucket(tmp_path)
    old = LineWriter(folder, "epochs.jsonl")
    old.write(number=0)
    assert not has_begun or old.flush()
    write(folder, range(10, 20))
    for number in range(1, 8):
        old.write(number=number)
        assert old.flush()
    write(folder, range(20, 22))
    assert sorted(numbers(folder)) == [*range(8), *range(10, 22)]
    assert [number for number in numbers(folder) if number >= 10] == [*range(10, 22)]


@pytest.mark.parametrize("count", range(10))
def test_segments_are_counted_in_few_requests(tmp_path, monkeypatch, count):
    folder = Bucket(tmp_path)
    for number in range(count):
        folder.write_bytes(segment("a.jsonl", number), b"")
    asked: list[str] = []
    exists = folder.exists
    monkeypatch.setattr(folder, "exists", lambda name: asked.append(name) or exists(name))
    assert count_segments(folder, "a.jsonl") == count
    assert len(asked) == len(set(asked)) <= 2 * (count + 1).bit_length()


@pytest.mark.parametrize("restarts", [1, 4, 9])
def test_a_bucket_holds_the_lines_of_a_disk(bucket, tmp_path, monkeypatch, restarts):
    """Each in files that are whole lines; a disk in one file."""
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 100)
    disk, far = RunFolder(tmp_path), RunFolder(f"{bucket}/{tmp_path.name}")
    for first in range(restarts):
        for folder in (disk, far):
            write(folder, range(7 * first, 7 * first + 7))
    assert numbers(far) == numbers(disk) == list(range(7 * restarts))
    assert list(disk.list_files()) == ["epochs.jsonl"]
    held = count_segments(far, "epochs.jsonl")
    assert set(far.list_files()) == {segment("epochs.jsonl", number) for number in range(held)}
    parts = [far.read_bytes(segment("epochs.jsonl", number)) for number in range(held)]
    assert b"".join(parts) == disk.read_bytes("epochs.jsonl")
    assert held > restarts and all(part.endswith(b"\n") for part in parts)


def test_what_was_flushed_is_there_though_the_writer_dies_before_the_next_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 60)
    folder = Bucket(tmp_path)
    write(folder, range(2))
    writer = LineWriter(folder, "epochs.jsonl")
    for number in range(2, 8):
        folder.fails = number % 2 == 1
        writer.write(number=number)
        assert writer.flush() is not folder.fails
        assert numbers(folder) == list(range(number if folder.fails else number + 1))
    folder.fails = False
    write(folder, range(7, 9))
    assert numbers(folder) == list(range(9))


def test_a_long_file_of_an_earlier_version_goes_on_in_a_segment(tmp_path):
    write(RunFolder(tmp_path), range(2 * SEGMENT_BYTES // 1000), bytes_of_a_line=1000)
    before, old = (tmp_path / "epochs.jsonl").read_bytes(), numbers(RunFolder(tmp_path))
    folder = Bucket(tmp_path)
    write(folder, range(len(old), len(old) + 2))
    assert (tmp_path / "epochs.jsonl").read_bytes() == before
    assert numbers(folder) == list(range(len(old) + 2))
    assert folder.num_read == len(before) + len((tmp_path / "epochs.jsonl.0001").read_bytes())


def test_a_copy_of_a_bucket_on_a_disk_goes_on_behind_its_last_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 60)
    write(Bucket(tmp_path), range(9))
    segments = sorted(path.name for path in tmp_path.iterdir())
    write(RunFolder(tmp_path), range(9, 12))
    assert numbers(RunFolder(tmp_path)) == list(range(12))
    assert sorted(path.name for path in tmp_path.iterdir()) == segments


def test_doctor_looks_into_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 60)
    folder = Bucket(tmp_path)
    folder.write_settings(settings(tmp_path, tmp_path, "run", 1))
    writer = LineWriter(folder, "epochs.jsonl")
    for number in range(3):
        writer.write(**vars(epoch_line(number)))
        writer.flush()
    assert examine(str(tmp_path)) == []
    (tmp_path / "epochs.jsonl.0002").write_text('{"epoch": 1}\n')
    (finding,) = examine(str(tmp_path))
    assert finding.startswith(f"{tmp_path}/epochs.jsonl.0002 cannot be read: line 1")


def test_tensorboard_reads_segments_as_one_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "SEGMENT_BYTES", 1000)
    log = TensorBoardLog(Bucket(tmp_path), settings(tmp_path, tmp_path, "run", 1), attempt=0, epoch=0)
    for step in range(1, 60):
        log.scalars(step, {"loss": float(step)})
        assert log.flush()
    assert len(list((tmp_path / FOLDER).iterdir())) > 3
    read = EventAccumulator(str(tmp_path / FOLDER))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [(step, step) for step in range(1, 60)]
