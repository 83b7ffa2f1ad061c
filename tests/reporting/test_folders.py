from pathlib import Path

import pytest

from safebridge.errors import DataError
from safebridge.reporting.folders import check_output_folder, replaced_folder


def test_a_new_folder_is_accepted_and_not_made_yet(tmp_path: Path) -> None:
    assert check_output_folder(tmp_path / "out") == tmp_path / "out"
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_result_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "out" / "artifact").mkdir(parents=True)
    (tmp_path / "out" / "summary.json").write_text("{}")
    check_output_folder(tmp_path / "out")


def test_a_folder_with_foreign_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"thesis\.tex.*Choose an empty or new folder"):
        check_output_folder(tmp_path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(DataError, match=r"it is a file\. Choose another --out"):
        check_output_folder(tmp_path / "out")


def test_a_missing_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Create it first"):
        check_output_folder(tmp_path / "a" / "b")


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(DataError, match="Choose a folder inside it"):
        check_output_folder(Path("/proc"))


def test_a_place_that_cannot_be_written_is_found_before_the_work() -> None:
    with pytest.raises(DataError, match=r"fdinfo\. Choose another --out"):
        check_output_folder(Path("/proc/self/fdinfo/out"))


def test_new_results_take_the_place_of_earlier_ones(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("first", "second"):
        with replaced_folder(out) as folder:
            (folder / "summary.json").write_text(text)
    assert [path.name for path in out.iterdir()] == ["summary.json"]
    assert (out / "summary.json").read_text() == "second"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_earlier_results_survive_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as folder:
        (folder / "summary.json").write_text("first")

    def fail() -> None:
        with replaced_folder(out) as folder:
            (folder / "summary.json").write_text("second")
            raise error

    with pytest.raises(error):
        fail()
    assert (out / "summary.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_earlier_results_survive_a_failed_move(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with replaced_folder(out) as folder:
        (folder / "summary.json").write_text("first")
    with pytest.raises(FileNotFoundError), replaced_folder(out) as folder:
        folder.rmdir()
    assert (out / "summary.json").read_text() == "first"
