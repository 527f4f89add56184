"""Lists, folders of class folders and class name files; prepared folders are in test_prepare."""

import pickle
from pathlib import Path

import pytest

from fluxvit_jax.data.annotations import (
    Example,
    Record,
    held_out_part,
    open_source,
    read_annotations,
    read_class_names,
    shuffled,
    training_part,
)
from fluxvit_jax.errors import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "a/x.mp4,0\nb/y.mp4,3\n",
        "path,label\r\na/x.mp4,0\r\nb/y.mp4,3",
        "\ufeffvideo, class\n\na/x.mp4, 0\n\nb/y.mp4, 3\n\n",
        "a/x.mp4 0\nb/y.mp4   3\n",
        "path\tlabel\na/x.mp4\t0\nb/y.mp4\t3\n",
        '"a/x.mp4",0\n./b/../b/y.mp4,3\n',
        "{root}/a/x.mp4,0\n{root}/b/y.mp4,3\n",
    ],
)
def test_every_way_to_write_a_list(tmp_path, text):
    videos = tmp_path / "videos"
    videos.mkdir()
    path = write(tmp_path / "list.csv", text.replace("{root}", str(videos)))
    assert read_annotations(path, videos, 4) == [
        Example("a/x.mp4", 0, f"{videos}/a/x.mp4"),
        Example("b/y.mp4", 3, f"{videos}/b/y.mp4"),
    ]


def test_root_is_the_folder_of_the_list_by_default(tmp_path, monkeypatch):
    write(tmp_path / "list.csv", "x.mp4,0\n")
    monkeypatch.chdir(tmp_path)
    assert read_annotations("list.csv")[0].source == str(tmp_path / "x.mp4")


def test_names_with_commas_blanks_and_other_letters(tmp_path):
    path = write(tmp_path / "list.csv", '"a, b/ö.mp4",1\nc d.mp4,0\n')
    assert [example.id for example in read_annotations(path)] == ["a, b/ö.mp4", "c d.mp4"]


def test_tab_separated_names_may_hold_blanks_but_not_blank_separated_ones(tmp_path):
    assert read_annotations(write(tmp_path / "a.txt", "a b.mp4\t1\n"))[0].id == "a b.mp4"
    with pytest.raises(UserError, match="line 1: 3 columns"):
        read_annotations(write(tmp_path / "b.txt", "a b.mp4 1\n"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x.mp4", "line 3: 1 columns"),
        ("x.mp4,1,train", "line 3: 3 columns"),
        ("x.mp4,walk", "line 3: label 'walk' is no integer"),
        ("x.mp4,1.0", "line 3: label '1.0' is no integer"),
        ("x.mp4,", "line 3: label '' is no integer"),
        ("x.mp4,-1", "line 3: label -1 must be one of 0..4"),
        ("x.mp4,5", "line 3: label 5 must be one of 0..4"),
        (",1", "line 3: path '' is not inside"),
        ("../x.mp4,1", "line 3: path '../x.mp4' is not inside"),
        ("a/../../x.mp4,1", "is not inside"),
        ("/etc/passwd,1", "line 3: path '/etc/passwd' is not inside"),
        ("a\0.mp4,1", "line 3"),
        ("https://example.org/x.mp4,1", "line 3: path 'https://example.org/x.mp4' is a URL"),
        ("file:///etc/passwd,1", "is a URL"),
        ('"x.mp4,1', "line 3: is not valid CSV"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "list.csv", f"path,label\n\n{line}\ny.mp4,0\n")
    with pytest.raises(UserError, match=message) as error:
        read_annotations(path, tmp_path, 5)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_bad_first_line_is_no_header(tmp_path):
    with pytest.raises(UserError, match="line 1: label 'walk'"):
        read_annotations(write(tmp_path / "list.csv", "x.mp4,walk\ny.mp4,1\n"))


def test_labels_have_no_upper_bound_without_classes(tmp_path):
    path = write(tmp_path / "list.csv", "x.mp4,709\n")
    assert read_annotations(path)[0].label == 709
    with pytest.raises(UserError, match="label -1 must be 0 or more"):
        read_annotations(write(path, "x.mp4,-1\n"))


def test_missing_and_empty_data(tmp_path):
    with pytest.raises(UserError, match="no data is given"):
        open_source("")
    with pytest.raises(UserError, match=r"list\.csv: no such file"):
        open_source(tmp_path / "list.csv")
    for text in ("", "\n\n", "path,label\n"):
        with pytest.raises(UserError, match="holds no videos"):
            open_source(write(tmp_path / "empty.csv", text))
    with pytest.raises(UserError, match=f"root of its paths, {tmp_path}/gone, is no folder"):
        open_source(write(tmp_path / "a.csv", "x.mp4,0\n"), tmp_path / "gone")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8"):
        open_source(tmp_path / "binary.csv")
    with pytest.raises(UserError, match="holds no class folders"):
        open_source(tmp_path)


def test_class_folders(tmp_path):
    for name in ("walk/2.mp4", "walk/deep/1.AVI", "run/3.webm", "run/notes.txt", ".cache/4.mp4"):
        write(tmp_path / name, name)
    (tmp_path / "sit").symlink_to(tmp_path / "walk")
    source = open_source(tmp_path, classes=3)
    assert source.class_names == ("run", "sit", "walk")
    assert [(record.id, record.label) for record in source] == [
        ("run/3.webm", 0),
        ("sit/2.mp4", 1),
        ("sit/deep/1.AVI", 1),
        ("walk/2.mp4", 2),
        ("walk/deep/1.AVI", 2),
    ]
    assert Path(source[2].video).read_text() == "walk/deep/1.AVI"  # through the link
    with pytest.raises(UserError, match="holds 3 class folders where 400 are expected"):
        open_source(tmp_path, classes=400)


def test_links_may_lead_out_of_the_root(tmp_path):
    video = write(tmp_path / "elsewhere" / "x.mp4", "x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.mp4").symlink_to(video)
    source = open_source(write(tmp_path / "list.csv", "x.mp4,0\n"), tmp_path / "root")
    assert Path(source[0].video).read_text() == "x"


def test_source_is_a_sequence_that_pickles(tmp_path):
    path = write(tmp_path / "list.csv", "x.mp4,1\ny.mp4,0\n")
    source = open_source(path)
    assert len(source) == 2 and source.class_names is None
    assert source[1] == Record("y.mp4", 0, str(tmp_path / "y.mp4"))
    with pytest.raises(IndexError):
        source[2]
    fingerprint = source.fingerprint
    copy = pickle.loads(pickle.dumps(source))
    assert list(copy) == list(source) and copy.fingerprint == fingerprint


@pytest.mark.parametrize(("share", "left_out"), [(0.1, 2), (0.25, 5), (0.5, 10)])
def test_what_is_held_out_is_what_training_leaves(tmp_path, share, left_out):
    path = write(tmp_path / "list.csv", "".join(f"{i}.mp4,{i % 3}\n" for i in range(20)))
    source = open_source(path)
    training, held_out = training_part(source, share), held_out_part(source, share)
    assert (len(training), len(held_out)) == (20 - left_out, left_out)
    assert {*training.ids, *held_out.ids} == set(source.ids)
    assert [record.id for record in training] == training.ids
    numbers = training.numbers.tolist()
    assert numbers == sorted(numbers)
    # More is held out by holding out more, not others.
    assert held_out.ids == held_out_part(source, 0.5).first(left_out).ids
    assert held_out_part(open_source(path), share).ids == held_out.ids
    copy = pickle.loads(pickle.dumps(held_out))
    assert list(copy) == list(held_out) and copy.fingerprint == held_out.fingerprint
    assert len({part.fingerprint for part in (source, training, held_out, shuffled(source))}) == 4
    assert training_part(source, 0.0) is source


def test_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    def of(folder, text, **files):
        for name, content in files.items():
            write(tmp_path / folder / f"{name}.mp4", content)
        return open_source(write(tmp_path / folder / "list.csv", text)).fingerprint

    same = of("1", "x.mp4,1\ny.mp4,0\n", x="abc", y="d")
    assert len(same) == 64 and same == of("2", "x.mp4 1\ny.mp4 0\n", x="abc", y="d")
    other = [
        of("3", "x.mp4,0\ny.mp4,0\n", x="abc", y="d"),  # a label
        of("4", "y.mp4,0\nx.mp4,1\n", x="abc", y="d"),  # the order
        of("5", "x.mp4,1\ny.mp4,0\n", x="abcd", y="d"),  # a size
        of("6", "x.mp4,1\ny.mp4,0\n", x="abc"),  # a missing file
        of("7", "x.mp4,1\n", x="abc", y="d"),
    ]
    assert len({same, *other}) == 6


def test_class_name_files(tmp_path):
    path = write(tmp_path / "a.txt", "walk a dog\nrun\n\n")
    assert read_class_names(path) == ("walk a dog", "run")
    for text, message in [("", "line 1"), ("a\n\nb\n", "line 2"), ("a\nb\na\n", "line 3")]:
        with pytest.raises(UserError, match=message):
            read_class_names(write(path, text))
    with pytest.raises(UserError, match="no such file"):
        read_class_names(tmp_path / "gone.txt")
