"""Lists, folders of class folders and class name files; prepared folders are in test_prepare."""

import os
import pickle
from pathlib import Path

import pytest
from etils import epath

from fluxvit_jax.data.annotations import (
    open_source,
    read_annotations,
    read_class_names,
    videos_below,
)
from fluxvit_jax.data.class_names import KnownNames
from fluxvit_jax.data.sources import Example, Record, held_out_part, shuffled, training_part
from fluxvit_jax.errors import UserError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, newline="", errors="surrogateescape")
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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b.mp4\t1\n", {"a b.mp4": 1}),
        ("drinking (31).mp4 0\nc.mp4   1\n", {"drinking (31).mp4": 0, "c.mp4": 1}),
        ("a, b.mp4\t0\nc.mp4\t1\n", {"a, b.mp4": 0, "c.mp4": 1}),
        ("c.mp4\t0\na, b.mp4\t1\n", {"a, b.mp4": 1, "c.mp4": 0}),
        ("path;label\nc.mp4;0\na, b.mp4;1\n", {"a, b.mp4": 1, "c.mp4": 0}),
        ("a;b.mp4,0\nc d.mp4,1\n", {"a;b.mp4": 0, "c d.mp4": 1}),
        ("a, b.mp4 0\nc.mp4 1\n", {"a, b.mp4": 0, "c.mp4": 1}),
        ("x.mp4, 0\ny.mp4, 1\n", {"x.mp4": 0, "y.mp4": 1}),
    ],
)
def test_what_separates_the_columns_is_told_by_all_lines(tmp_path, text, expected):
    examples = read_annotations(write(tmp_path / "list", text))
    assert {example.id: example.label for example in examples} == expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b.mp4\nc.mp4\n", ["a, b.mp4", "c.mp4"]),
        ("a.mp4,3\nb.mp4\n", ["a.mp4", "b.mp4"]),
        ('"a, b.mp4"\nc.mp4\n', ["a, b.mp4", "c.mp4"]),
        ("a;3\nb;4\n", ["a", "b"]),
        ("path\nclip_a\nclip_b\n", ["clip_a", "clip_b"]),
        ("video_id,caption\nclip_a,one\nclip_b,two\n", ["clip_a", "clip_b"]),
        ("clip_a\nclip_b\n", ["clip_a", "clip_b"]),
        ("clip_a,nan\nclip_b,2\n", ["clip_a", "clip_b"]),
        ("image,9\nclip_b,2\n", ["clip_b"]),
        ("video,9\nclip_b,2\n", ["video", "clip_b"]),  # there is such a file
    ],
)
def test_lists_without_labels(tmp_path, text, names):
    (tmp_path / "video").touch()
    examples = read_annotations(write(tmp_path / "list", text), labelled=False)
    assert [example.id for example in examples] == names


@pytest.mark.parametrize("header", ["Video_ID,class idx", "#path,label", "filename,ClassIndex"])
def test_a_first_line_that_names_columns_is_no_video(tmp_path, header):
    path = write(tmp_path / "list.csv", f"{header}\nclip_a,1\n")
    assert [example.id for example in read_annotations(path)] == ["clip_a"]


@pytest.mark.parametrize("first", ["clip_a,nan", "clip_a,", "video,nan", "clip_a,walk"])
def test_a_first_line_that_may_be_a_video_is_not_dropped(tmp_path, first):
    with pytest.raises(UserError, match=r"line 1: label .* is no integer"):
        read_annotations(write(tmp_path / "list.csv", f"{first}\nclip_b,1\n"))


def test_one_video_has_one_label(tmp_path):
    path = write(tmp_path / "list.csv", "path,label\nc.mp4,0\na.mp4,0\n./c.mp4,1\n")
    with pytest.raises(UserError, match=r"line 4: c\.mp4 has label 1, but 0 in line 2"):
        read_annotations(path)
    write(path, "c.mp4,0\na.mp4,0\nc.mp4,0\n")  # twice the weight
    assert [example.id for example in read_annotations(path)] == ["c.mp4", "a.mp4", "c.mp4"]
    write(path, "c.mp4,0\nc.mp4,1\n")
    assert len(read_annotations(path, labelled=False)) == 2


def test_names_that_are_not_utf8_are_shown_escaped(tmp_path):
    root = os.fsencode(tmp_path)
    os.makedirs(root + b"/cl\xe9")
    for name in (b"/cl\xe9/b\xe8.mp4", b"/cl\xe9/a.mp4"):
        with open(root + name, "w") as file:
            file.write("x")
    folders = open_source(tmp_path, classes=1)
    assert folders.class_names == ("cl\\xe9",)
    assert folders.ids == ["cl\\xe9/a.mp4", "cl\\xe9/b\\xe8.mp4"]
    (tmp_path / "list.csv").write_bytes(b"cl\xe9/a.mp4,0\ncl\xe9/b\xe8.mp4,0\n")
    listed = open_source(tmp_path / "list.csv")
    assert listed.ids == folders.ids and listed.fingerprint == folders.fingerprint
    for source in (listed, folders):
        assert [Path(record.video).read_text() for record in source] == ["x", "x"]
    (tmp_path / "list.csv").write_bytes(b"cl\xe9/a.mp4,0\nwalk\xe9.mp4,0\n")
    with pytest.raises(UserError, match=r"line 2: is not UTF-8, and .* no file walk\\xe9\.mp4"):
        open_source(tmp_path / "list.csv")


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
        ("x.mp4,99999999999999999999", "line 3: label 99999999999999999999 must be one of 0..4"),
        ("x.mp4 7 1", "line 3: 1 columns"),
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


@pytest.mark.parametrize(
    "text",
    [
        "a.mp4,juggling\nb.mp4,Archery\nc.mp4,juggling\n",
        "path,label\na.mp4,juggling\nb.mp4,Archery\nc.mp4,Juggling\n",
        "filename;activity\na.mp4;juggling\nb.mp4;Archery\nc.mp4;juggling\n",
        'a.mp4\tjuggling\nb.mp4\tArchery\nc.mp4\t"juggling"\n',
    ],
)
def test_labels_may_be_names(tmp_path, text):
    """The label is the index of the sorted names, which are spelled as they are first."""
    source = open_source(write(tmp_path / "list.csv", text), classes=2)
    assert source.class_names == ("Archery", "juggling") and source.classes == 2
    assert [(record.id, record.label) for record in source] == [
        *(("a.mp4", 1), ("b.mp4", 0), ("c.mp4", 1)),
    ]
    with pytest.raises(UserError, match=r"list\.csv: names 2 classes where 3 are expected"):
        open_source(tmp_path / "list.csv", classes=3)


@pytest.mark.parametrize("header", ["recording,gesture", "# videos, recorded in May"])
def test_a_first_line_unlike_all_others_names_columns(tmp_path, header):
    rows = "a.mp4,walk\nb.mp4,run\n"
    path = write(tmp_path / "list.csv", f"{header}\n{rows}")
    assert open_source(path).class_names == ("run", "walk")
    write(tmp_path / header.split(",")[0], "x")  # there is such a video
    assert len(open_source(path)) == 3
    assert len(open_source(write(path, f"c,walk\n{rows}"))) == 3
    assert len(open_source(write(path, f"c.mp4,jump\n{rows}"))) == 3
    assert len(open_source(write(path, "c,jump\n"))) == 1


def test_accents_may_be_letters_of_their_own(tmp_path):
    """As file systems of macOS write them."""
    path = write(tmp_path / "list.csv", "a.mp4,caf\u00e9\nb.mp4,cafe\u0301\n")
    assert open_source(path).class_names == ("caf\u00e9",)
    write(tmp_path / "folders" / "cafe\u0301" / "a.mp4", "x")
    known = KnownNames(("caf\u00e9",), "the checkpoint")
    assert open_source(tmp_path / "folders", known=known)[0].label == 0


def test_names_with_separators_in_them(tmp_path):
    path = write(tmp_path / "list.csv", 'a, 1.mp4\tfold; unfold\n"b.mp4"\tput, take\n')
    assert open_source(path).class_names == ("fold; unfold", "put, take")
    quoted = write(tmp_path / "quoted.csv", 'a.mp4,"put, take"\nb.mp4,fold; unfold\n')
    assert open_source(quoted).class_names == ("fold; unfold", "put, take")


KNOWN = KnownNames(("walk", "air drumming", "Archery"), "the checkpoint")


def test_names_are_looked_up_where_their_order_is_known(tmp_path):
    """In a list and in class folders, of which some may be missing; numbers are as they are."""
    named = open_source(
        write(tmp_path / "list.csv", "a.mp4,archery\nb.mp4,Air_Drumming\n"), classes=3, known=KNOWN
    )
    assert [record.label for record in named] == [2, 1]
    for name in ("archery/a.mp4", "air_drumming/b.mp4"):
        write(tmp_path / "folders" / name, "x")
    folders = open_source(tmp_path / "folders", classes=3, known=KNOWN)
    assert [(record.id, record.label) for record in folders] == [
        *(("air_drumming/b.mp4", 1), ("archery/a.mp4", 2)),
    ]
    assert named.class_names == folders.class_names == KNOWN.names
    numbers = open_source(write(tmp_path / "list.csv", "a.mp4,0\n"), classes=3, known=KNOWN)
    assert numbers[0].label == 0 and numbers.class_names is None
    write(tmp_path / "folders" / "swim/a.mp4", "x")
    other = open_source(tmp_path / "folders", known=KNOWN)
    assert other.class_names == ("air_drumming", "archery", "swim")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.mp4,walk\nb.mp4,air druming\n",
            "line 2: class 'air druming' is none of the 3 of the checkpoint; did you mean 'air d",
        ),
        ("a.mp4,walk\nb.mp4,\n", "line 2: the label is missing"),
        ("a.mp4,walk\nb.mp4,1\n", "line 1: label 'walk' is no integer; labels are all numbers, or"),
        ("a.mp4 walk\nb.mp4 archery\n", "line 1: label 'walk' is no integer; .* after a comma"),
        ("a.mp4,1.0\nb.mp4,2.0\n", "line 1: label '1.0' is no integer"),
        ("a.mp4,nan\nb.mp4,nan\n", "line 1: label 'nan' is no integer"),
        ("a.mp4,walk\nb.mp4,walk,run\n", "line 2: 3 columns where path,label are 2"),
        ("a.mp4,walk\nb.mp4,caf\udce9\n", r"line 2: label caf\\xe9 is not UTF-8; write the list"),
        ("label,path\nwalk,a.mp4\nwalk,b.mp4\n", "the second column holds the videos; write path"),
        ("0,a.mp4\n1,b.MOV\n", "the second column holds the videos"),
        ("a.mp4,walk\na.mp4,Archery\n", "line 2: a.mp4 has label 'Archery', but 'walk' in line 1"),
    ],
)
def test_a_bad_name_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        open_source(write(tmp_path / "list.csv", text), known=KNOWN)
    assert "\n" not in str(error.value) and str(tmp_path / "list.csv") in str(error.value)


def test_labels_have_no_upper_bound_without_classes(tmp_path):
    path = write(tmp_path / "list.csv", "x.mp4,709\n")
    assert read_annotations(path)[0].label == 709
    with pytest.raises(UserError, match="label -1 must be 0 or more"):
        read_annotations(write(path, "x.mp4,-1\n"))
    for label in (2**31, 10**20 - 1, "9" * 5000):
        with pytest.raises(UserError, match=r"line 1: label \d+ must be one of 0\.\.2147483647"):
            read_annotations(write(path, f"x.mp4,{label}\n"))


def test_three_columns_apart_by_blanks_are_an_error(tmp_path):
    with pytest.raises(UserError, match="line 1: 3 columns"):
        read_annotations(write(tmp_path / "list.txt", "x.mp4 120 1\ny.mp4 90 0\n"))


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


def test_links_to_folders_are_followed_once(tmp_path):
    root, elsewhere = tmp_path / "set" / "root", tmp_path / "elsewhere"
    for name in ("run/1.mp4", "run/deep/2.mp4", "walk/3.mp4"):
        write(root / name, name)
    write(elsewhere / "4.mp4", "4")
    before = open_source(root).ids
    for link, target in {
        "run/itself": ".",
        "run/root": "..",
        "run/above": "../..",
        "run/deep/up": "../..",
        "run/a_copy": "deep",  # sorted before the real folder
        "all": ".",
        "above": "..",
    }.items():
        (root / link).symlink_to(target)
    source = open_source(root, classes=2)
    assert source.class_names == ("run", "walk") and source.ids == before
    for link in ("walk/b", "walk/a"):
        (root / link).symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    assert open_source(root).ids == [*before, "walk/a/4.mp4"]
    found = sorted(path.relative_to(root).as_posix() for path in videos_below(epath.Path(root)))
    assert found == [*before, "walk/a/4.mp4"]


def test_hidden_files_and_films_of_predictions_are_no_videos_of_a_folder(tmp_path):
    for name in ("a/1.VOB", "a/.2.mp4", "a/1.kept.mp4", "a/kept.mp4", "a/1.kept.html"):
        write(tmp_path / name, name)
    assert [path.name for path in videos_below(epath.Path(tmp_path))] == ["1.VOB", "kept.mp4"]
    assert open_source(tmp_path).ids == ["a/1.VOB", "a/kept.mp4"]


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
