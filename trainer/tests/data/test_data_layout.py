"""Where the splits and the classes are, what was left out, and what is said where it can't be told."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import pytest
from data_sets import encoded, files, laid, pixels, refused, taken, tarred, zipped
from runs import cli_command

from k8scifar.data.reading.images import read_tree

GOOD = files()


def said(path, capsys) -> str:
    """The account of what was taken."""
    capsys.readouterr()
    read_tree(path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("took ")]
    return line


def renamed(content: dict[str, bytes], **names: str) -> dict[str, bytes]:
    """The files with their first folder under another name."""
    return {f"{names.get(name.split('/')[0], name.split('/')[0])}/{name.partition('/')[2]}": data
            for name, data in content.items()}  # fmt: skip


def below(content: dict[str, bytes], folder: str) -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in content.items()}


# --- where the splits are


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "TEST"), ("training", "testing"), ("train", "val"), ("train", "Valid"), ("TRAINING", "validation")],
)
def test_the_splits_by_any_of_their_names(tmp_path, train, test, capsys):
    path = laid(tmp_path / "set", renamed(GOOD, train=train, test=test))
    assert taken(path) == taken(laid(tmp_path / "good", GOOD))
    line = said(path, capsys)
    assert ("/ is taken as train" in line) == (train.lower() != "train")
    assert ("/ is taken as test" in line) == (test.lower() != "test")


@pytest.mark.parametrize("where", ["train", "test", "a/b/c", "train/data", "train/x/test"])
@pytest.mark.parametrize("pack", ["folder", "tar", "zip"])
def test_the_splits_may_lie_deeper_in_folders_of_any_name(tmp_path, where, pack):
    content = below(GOOD, where)
    path = laid(tmp_path / "set", content) if pack == "folder" else tmp_path / "set.file"
    if pack != "folder":
        path.write_bytes(tarred(content) if pack == "tar" else zipped(content))
    assert taken(path) == taken(laid(tmp_path / "good", GOOD))


def test_classes_may_be_called_like_splits(tmp_path):
    content = files(classes=("bus", "train", "tram", "test"))
    assert list(taken(laid(tmp_path, content))) == ["bus", "test", "train", "tram"]


def test_test_is_preferred_to_val_and_it_is_said(tmp_path, capsys):
    content = GOOD | below({f"cat/{n}.png": encoded(pixels(90 + n)) for n in range(5)}, "valid")
    path = laid(tmp_path / "set", content)
    assert taken(path) == taken(laid(tmp_path / "good", GOOD))
    assert said(path, capsys) == "took 6 train + 4 test images of 2 classes; not used: valid/ (5 images)"


def test_val_is_taken_where_test_has_no_classes(tmp_path, capsys):
    """A competition: the images of test/ have no labels."""
    content = renamed(GOOD, test="val") | {f"test/{n}.png": encoded(pixels(n)) for n in range(3)}
    line = said(laid(tmp_path, content), capsys)
    assert line == "took 6 train + 4 test images of 2 classes; val/ is taken as test; not used: test/ (3 images)"


def test_the_same_set_twice_is_refused(tmp_path):
    content = below(GOOD, "chest_xray") | below(GOOD, "chest_xray/chest_xray")
    words = refused(laid(tmp_path, content))
    assert "train/ and test/ in 2 places (chest_xray/, chest_xray/chest_xray/); name one of these" in words


def test_a_link_to_the_set_is_no_second_place(tmp_path):
    laid(tmp_path / "set" / "v1", GOOD)
    (tmp_path / "set" / "latest").symlink_to("v1")
    assert taken(tmp_path / "set") == taken(tmp_path / "set" / "v1")


@pytest.mark.parametrize("more", [{"train": "Train"}, {"train": "training"}, {"test": "testing"}])
def test_two_folders_for_one_split_are_refused(tmp_path, more):
    assert "of which only one can be each split" in refused(laid(tmp_path, GOOD | renamed(GOOD, **more)))


def test_val_and_valid_without_test_are_refused(tmp_path):
    content = renamed(GOOD, test="val") | renamed(GOOD, test="valid")
    words = refused(laid(tmp_path, content))
    assert "val/" in words and "valid/" in words and "only one" in words


# --- what is said where there are none


def test_images_without_class_folders_are_told(tmp_path):
    content = {name: data for name, data in GOOD.items() if name.startswith("train")}
    content |= {f"test/{n}.png": encoded(pixels(n)) for n in range(4)}
    assert "has 4 images in test/ itself, and an image's class is the folder that it is in" in refused(
        laid(tmp_path, content)
    )


def counts(made: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(map(len, parts)) for name, parts in made.items()}


def shell(command: str) -> None:
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)


def test_a_set_without_a_split_is_told_with_a_command_that_splits_it(tmp_path):
    names = ("bus", "train", "tram")
    content = {f"{name}/{n}.png": encoded(pixels(n)) for name in names for n in range(12)}
    path = laid(tmp_path / "my images", content)
    words = refused(path)
    assert "has 3 classes (bus/ with 12, train/ with 12, tram/ with 12), but no split into train/ and test/" in words
    command = words[words.index("(cd") : words.index(" -- then name ")]
    shell(command)
    made = taken(tmp_path / "split")
    assert words.endswith(f"-- then name {tmp_path / 'split'}")
    assert counts(made) == dict.fromkeys(names, (10, 2))


def test_classes_in_the_names_are_told_with_a_command(tmp_path):
    places = [f"cifar/{split}/{n}_{name}.png" for split in ("train", "test") for n in range(4) for name in ("a", "b-c")]
    content = {place: encoded(pixels(number)) for number, place in enumerate(places)}
    words = refused(laid(tmp_path, content | {"cifar/labels.txt": b"cat\n"}))
    assert "has 8 images in cifar/train/ itself" in words
    shell(words[words.index("(cd") : words.index(" -- then name ")])
    assert counts(taken(tmp_path / "split")) == {"a": (4, 4), "b-c": (4, 4)}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "holds no files"),
        (
            {"train/cat/a": b"x", "test/cat/a": b"x", "test/dog/b": b"x"},
            "holds no image, but 3 files (3 without a suffix)",
        ),
        ({"plain/train-0.parquet": b"PAR1"}, "Parquet is not taken; write its images"),
        ({"data.tar.gz": b"x"}, "holds 1 file (1 .gz): name the archive itself"),
        ({"cifar-100-python/train": b"", "cifar-100-python/test": b""}, "is CIFAR-100, whose batches are not taken"),
        (
            {name: data for name, data in GOOD.items() if "train" in name},
            "but no test/ (nor val/, valid/, validation/) beside",
        ),
        ({"a.png": b"", "b.png": b""}, "has no train/<class>/ and test/<class>/, but 2 images: 2 in its top"),
        ({"train/cat/a.png": b"", "test/cat/a.txt": b""}, "has no images in test/<class>/, but 1 file (1 .txt)"),
    ],
)
def test_what_was_found_is_listed(tmp_path, content, words):
    assert words in refused(laid(tmp_path, content))


def test_one_split_named_instead_of_both_is_told(tmp_path):
    words = refused(laid(tmp_path, GOOD) / "train")
    assert "has 2 classes (cat/ with 3, dog/ with 3) of one split; name the folder that holds both" in words


def test_one_class_is_too_few(tmp_path):
    assert "has one class only (cat)" in refused(laid(tmp_path, files(classes=("cat",))))


# --- the account


def test_everything_left_out_is_counted(tmp_path, capsys):
    content = GOOD | {
        "train/cat/.DS_Store": b"", "train/cat/Thumbs.db": b"", "__MACOSX/train/cat/._0.png": b"", ".git/config": b"",
        "train/cat/a.heic": b"", "train/dog/b.heic": b"", "test/cat/c": b"", "train/notes.txt": b"",
        "train/loose.png": GOOD["train/cat/0.png"], "extra/x.png": GOOD["train/cat/0.png"], "readme.md": b"",
    }  # fmt: skip
    path = laid(tmp_path, content)
    (path / "train" / "bird").mkdir()
    (path / "test" / "bird").mkdir()
    (path / "train" / "cat" / "again").symlink_to("..")
    assert said(path, capsys) == (
        "took 6 train + 4 test images of 2 classes; not used: extra/ (1 image); left out: 4 hidden, 4 by suffix "
        "(2 .heic, 1 .txt, 1 without a suffix), 1 image outside of a class's folder, 1 link to a folder above; "
        "folders without images: train/bird, test/bird"
    )


@pytest.mark.parametrize("pack", [tarred, zipped])
def test_the_account_of_an_archive_is_its_folders(tmp_path, capsys, pack):
    content = GOOD | {"train/cat/a.heic": b"", "train/.DS_Store": b"", "val/cat/0.png": GOOD["test/cat/0.png"]}
    (tmp_path / "data.file").write_bytes(pack(content))
    line = said(tmp_path / "data.file", capsys)
    assert line == said(laid(tmp_path / "set", content), capsys)
    assert "left out: 1 hidden, 1 by suffix (1 .heic)" in line


def test_links_are_followed_to_files_and_folders(tmp_path):
    laid(tmp_path / "set", GOOD)
    laid(tmp_path / "disk", files(classes=("bird",)))
    for split in ("train", "test"):
        (tmp_path / "set" / split / "bird").symlink_to(f"../../disk/{split}/bird")
    (tmp_path / "set" / "train" / "cat" / "9.png").symlink_to("../dog/0.png")
    made = taken(tmp_path / "set")
    assert made["bird"] == taken(laid(tmp_path / "whole", files(classes=("bird", "cat"))))["bird"]
    assert made["cat"][0][-1] == made["dog"][0][0]


@pytest.mark.parametrize("place", ["train/cat/9.png", "train/bird", "train/cat/more"])
def test_a_link_without_a_target_is_named(tmp_path, place):
    (laid(tmp_path, GOOD) / place).symlink_to("/nowhere/9.png")
    assert f"{place} is a link to /nowhere/9.png, which can't be followed" in refused(tmp_path)


def test_links_elsewhere_do_not_matter_and_links_in_a_circle_do(tmp_path, capsys):
    laid(tmp_path, GOOD)
    (tmp_path / "elsewhere").symlink_to("/nowhere")
    assert "1 that can't be read (elsewhere)" in said(tmp_path, capsys)
    (tmp_path / "test" / "dog" / "x.png").symlink_to("x.png")
    assert "test/dog/x.png is a link to x.png, which can't be followed" in refused(tmp_path)


def test_a_split_that_is_a_broken_link_is_named(tmp_path):
    laid(tmp_path, {name: data for name, data in GOOD.items() if "train" in name})
    (tmp_path / "test").symlink_to("/nowhere/test")
    assert "test is a link to /nowhere/test, which can't be followed" in refused(tmp_path)


def test_pipes_and_sockets_are_named_and_never_opened(tmp_path):
    laid(tmp_path, GOOD)
    os.mkfifo(tmp_path / "train" / "cat" / "x.png")
    assert "train/cat/x.png is neither a file nor a folder" in refused(tmp_path)
    (tmp_path / "train" / "cat" / "x.png").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        old = os.getcwd()
        os.chdir(tmp_path / "train" / "cat")  # a socket's path is short
        server.bind("y.png")
        os.chdir(old)
        assert "train/cat/y.png is neither a file nor a folder" in refused(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder; name a folder or an archive" in refused(tmp_path / "pipe")


@pytest.mark.parametrize("place", ["train/cat/0.png", "train/cat", "train", "."])
def test_what_may_not_be_read_is_an_error_of_reading(tmp_path, place):
    """Without root's right to read everything."""
    laid(tmp_path / "set", GOOD)
    (tmp_path / "set" / place).chmod(0)
    command = cli_command("prepare", "--source", f"imagefolder:{tmp_path}/set", "--data-dir", f"{tmp_path}/data")
    if os.geteuid() == 0:
        if not (setpriv := shutil.which("setpriv")):
            pytest.skip("needs setpriv, to lay down root's rights")
        drop = "-dac_override,-dac_read_search"
        command = [setpriv, f"--bounding-set={drop}", f"--inh-caps={drop}", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    (tmp_path / "set" / place).chmod(0o755)
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2, done.stderr
    assert "can't be read (Permission denied)" in line
    assert "written" not in line
    assert place == "." or place in line


def test_a_whole_class_lost_is_refused(tmp_path):
    content = GOOD | {f"{split}/bird/{n}.heic": b"" for split in ("train", "test") for n in range(3)}
    assert "train/bird holds 3 files (3 .heic), and no image; convert them" in refused(laid(tmp_path, content))


def test_a_class_in_one_split_only_is_named(tmp_path):
    bird = files(classes=("bird",))
    words = refused(laid(tmp_path / "a", GOOD | {"train/bird/0.png": bird["train/bird/0.png"]}))
    assert "differ in the classes bird (only in train/)" in words
    (laid(tmp_path / "b", GOOD | {"test/bird/0.png": bird["test/bird/0.png"]}) / "train" / "bird").mkdir()
    assert "differ in the classes bird (only in test/)" in refused(tmp_path / "b")
    words = refused(laid(tmp_path / "c", files() | {"train/Bird/0.png": b"", "test/bird/0.png": b""}))
    assert "differ in capital letters only: Bird and bird" in words
    both = files(classes=("Cat", "cat", "dog"))
    assert list(taken(laid(tmp_path / "d", both))) == ["Cat", "cat", "dog"]


def test_an_empty_folder_in_one_split_is_told_and_no_class(tmp_path, capsys):
    (laid(tmp_path, GOOD) / "train" / "bird").mkdir()
    line = said(tmp_path, capsys)
    assert line == "took 6 train + 4 test images of 2 classes; folders without images: train/bird"


def test_images_in_folders_of_a_class_and_below_hidden_folders(tmp_path):
    content = GOOD | {"train/cat/2024/may/a.png": encoded(pixels(5))}
    assert len(taken(laid(tmp_path / ".cache" / "images", content))["cat"][0]) == 4


def test_the_order_is_torchvisions(tmp_path):
    from k8scifar.compat import import_torchvision

    import_torchvision()
    from torchvision.datasets import ImageFolder

    content = files(classes=("b", "a", "B"), train=12) | {"train/a/sub/x.png": encoded(pixels(8))}
    path = laid(tmp_path, content)
    wanted = ImageFolder(str(path / "train"))
    classes, splits = read_tree(path)
    assert classes == wanted.classes
    assert splits["train"].labels.tolist() == wanted.targets
    assert [image.tobytes() for image in splits["train"].images] == [image.tobytes() for image, _ in wanted]
