"""The one folder whose children are the two splits, and its classes; or one line about what was found instead."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

from k8scifar.data.reading.archive_members import WRITE
from k8scifar.data.reading.tree import File, Place, is_image, suffix
from k8scifar.errors import UserError

TRAIN = ("train", "training")
SECOND = (("test", "testing"), ("val", "valid", "validation"))  # what is taken as test, the first that is there
NESTED = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}
SHOWN = 5

# For people whose set has no split: every sixth image to test, by links, in a shell of any kind.
SPLIT = (
    "(cd {folder} && n=0; for f in */*; do n=$((n+1)); s=train; [ $((n%6)) = 0 ] && s=test; "
    'mkdir -p "../split/$s/${{f%/*}}"; ln -s "$PWD/$f" "../split/$s/$f"; done)'
)
# For people whose classes are in the files' names, as in 12_frog.png.
BY_NAME = (
    "(cd {folder} && for f in {train}/*_*.* {second}/*_*.*; do c=${{f##*_}}; c=${{c%.*}}; "
    'mkdir -p "../split/${{f%%/*}}/$c"; ln -s "$PWD/$f" "../split/${{f%%/*}}/$c/${{f##*/}}"; done)'
)


@dataclass(frozen=True)
class Layout:
    """The two splits, and what their parent is."""

    parent: Place
    train: Place
    test: Place

    @property
    def splits(self) -> dict[str, Place]:
        return {"train": self.train, "test": self.test}


def find(root: Place, label: str) -> Layout:
    """The splits in a walked tree. Raises UserError, listing what was found, where there are none or several."""
    pairs = [layout for place in root.below for layout in _pairs(place)]
    found: dict[tuple, Layout] = {}  # by identity: a link to a folder is no second place
    for layout in filter(_good, pairs):
        found.setdefault((layout.train.identity, layout.test.identity), layout)
    places = {layout.parent.path: layout.parent for layout in found.values()}
    if len(places) > 1:
        names = ", ".join(_path(place) for place in list(places.values())[:SHOWN])
        raise UserError(
            f"{label} holds train/ and test/ in {len(places)} places ({names}); name one of these folders, or remove "
            "the others"
        )
    for names in SECOND:
        chosen = [layout for layout in found.values() if _base(layout.test).lower() in names]
        if len(chosen) > 1:
            both = ", ".join(sorted({part.path + "/" for layout in chosen for part in (layout.train, layout.test)}))
            raise UserError(f"{label} holds {both}, of which only one can be each split; rename or remove the others")
        if chosen:
            return chosen[0]
    raise UserError(f"{label} {_instead(root, pairs, label)}")


def classes(layout: Layout, label: str) -> list[tuple[str, dict[str, Place]]]:
    """(class name, its folder in each split), in alphabetical order: the labels' numbering.

    Names are in Unicode's composed form. Raises UserError where a class is lost, in one split only, or can't be named.
    """
    named: dict[str, dict[str, Place]] = {split: {} for split in layout.splits}
    lost: list[Place] = []
    for split, place in layout.splits.items():
        for name, folder in sorted(place.folders.items()):
            _refuse_lost(folder, label)
            if not folder.images:
                lost += [folder] if folder.file_count else []
                continue
            own = class_name(name, f"{label}: {place.name(name)}")
            if own in named[split]:
                raise UserError(
                    f"{label}: {place.path}/ has two folders called {own}, in two Unicode forms; rename one"
                )
            named[split][own] = folder
        for name, reason in place.lost.items():
            raise UserError(f"{label}: {place.name(name)} {reason}; mend or remove it")
    train, test = named["train"], named["test"]
    if odd := sorted(set(train) ^ set(test)):
        raise UserError(f"{label}: {_differ(layout, odd, train)}")
    if lost:
        raise UserError(
            f"{label}: {lost[0].path} holds {_files(lost[0])}, and no image; convert them, or remove the folder"
        )
    if len(train) < 2:
        raise UserError(f"{label} has one class only ({', '.join(train)}); there must be two or more")
    return [(name, {"train": train[name], "test": test[name]}) for name in sorted(train)]


def class_name(name: str, what: str) -> str:
    """A name from outside in Unicode's composed form. Raises UserError where it can't be written as text."""
    name = unicodedata.normalize("NFC", name)
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = what.encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{shown} has a name that is not UTF-8; rename it") from None
    if name in ("", ".", "..") or any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in name):
        raise UserError(f"{what!r} can't be a class's name: it holds control characters; rename it")
    return name


def suffixes(names: list[str]) -> str:
    """How many files of each suffix: "4 .gif, 2 without a suffix"."""
    counts = Counter(suffix(name) for name in names).most_common()
    said = [f"{count:,} {kind or 'without a suffix'}" for kind, count in counts[:SHOWN]]
    return ", ".join(said + (["..."] if len(counts) > SHOWN else []))


def _base(place: Place) -> str:
    return place.path.rpartition("/")[2]


def _path(place: Place) -> str:
    return f"{place.path}/" if place.path else "its top"


def _pairs(place: Place) -> list[Layout]:
    """Each pair of a train/ and a test/ or val/ among a folder's children."""
    by_name = {names: [sub for name, sub in sorted(place.folders.items()) if name.lower() in names]
               for names in (TRAIN, *SECOND)}  # fmt: skip
    return [Layout(place, train, test) for names in SECOND for train in by_name[TRAIN] for test in by_name[names]]


def _good(layout: Layout) -> bool:
    return all(any(folder.images for folder in split.folders.values()) for split in layout.splits.values())


def _refuse_lost(folder: Place, label: str) -> None:
    """Raise UserError where something in a class's folder can't be used."""
    for place in folder.below:
        for name, reason in sorted(place.lost.items()):
            raise UserError(f"{label}: {place.name(name)} {reason}; mend or remove it")


def _differ(layout: Layout, odd: list[str], train: dict[str, Place]) -> str:
    """What to say of classes that one split has and the other has not."""
    first, second = (f"{_base(place)}/" for place in (layout.train, layout.test))
    by_letters: dict[str, list[str]] = {}
    for name in odd:
        by_letters.setdefault(name.casefold(), []).append(name)
    if twins := [names for names in by_letters.values() if len(names) > 1]:
        return f"{first} and {second} differ in capital letters only: {' and '.join(twins[0])}; rename one"
    said = ", ".join(f"{name} (only in {first if name in train else second})" for name in odd[:SHOWN])
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    return f"{first} and {second} differ in the classes {said}{more}; both need images of each class"


def _files(place: Place) -> str:
    """The files in a folder and below, by suffix, as people say it."""
    names = [name for below in place.below for name in below.files]
    return f"{len(names):,} file{'s' * (len(names) != 1)} ({suffixes(names)})"


def _instead(root: Place, pairs: list[Layout], label: str) -> str:
    """What was found where no good pair of splits is, and the way."""
    names = [name for place in root.below for name in place.files]
    for place in root.below:
        for name, reason in sorted(place.lost.items()):
            if name.lower() in (*TRAIN, *SECOND[0], *SECOND[1]) or not root.images:
                return f"has no train/ and test/ with images: {place.name(name)} {reason}; mend it"
    kinds = {suffix(name) for name in names}
    if names and not root.images:
        if ".parquet" in kinds:
            return f"holds {_files(root)}: Parquet is not taken; {WRITE} (CIFAR-10 itself: --source cifar10)"
        if kinds <= NESTED | {".txt", ".md", ".csv", ".json"} and kinds & NESTED:
            return f"holds {_files(root)}: name the archive itself, or the folder that unpacking it makes"
        return f"holds no image, but {_files(root)}; images are known by suffix: .jpg .png .webp .bmp .tif .gif ..."
    if not names:
        return "holds no files; it must hold train/<class>/ and test/<class>/ with images"
    if pairs:
        return _weak(pairs[0], label)
    for place in root.below:  # the shallowest comes first
        if trains := [sub for name, sub in place.folders.items() if name.lower() in TRAIN and _classes(sub)]:
            beside = ", ".join(f"{name}/" for name in place.folders if name != _base(trains[0])) or "nothing else"
            return (
                f"has {trains[0].path}/ with {len(_classes(trains[0]))} classes, but no test/ (nor val/, valid/, "
                f"validation/) beside it: {beside}; name the folder that holds both"
            )
    several = next((place for place in root.below if len(_classes(place)) > 1), None)
    if several is None:
        return f"has no train/<class>/ and test/<class>/, but {len(root.images):,} images: {_listed(root)}"
    where = f" in {several.path}/" if several.path else ""
    path = "/".join(part for part in (_plain(label), several.path) if part)
    if os.path.basename(path).lower() in (*TRAIN, *SECOND[0], *SECOND[1]):
        return (
            f"has {len(_classes(several))} classes ({_listed(several)}) of one split; name the folder that holds both"
        )
    return (
        f"has {len(_classes(several))} classes{where} ({_listed(several)}), but no split into train/ and test/; "
        f"every sixth image as test{_unpacked(label)}: {SPLIT.format(folder=_quoted(path))} -- then name "
        f"{_beside(path)}"
    )


def _weak(layout: Layout, label: str) -> str:
    """What is wrong with a train/ and a test/ that are no two splits."""
    for split in (layout.train, layout.test):
        if _classes(split):
            continue
        flat = [name for name in split.files if is_image(name)]
        if not flat:
            return f"has no images in {split.path}/<class>/, but {_files(split)}"
        said = f"has {len(flat):,} images in {split.path}/ itself, and an image's class is the folder that it is in"
        if all(re.fullmatch(r".+_[^_/]+\.\w+", name) for name in flat):
            path = "/".join(part for part in (_plain(label), layout.parent.path) if part)
            command = BY_NAME.format(folder=_quoted(path), train=_base(layout.train), second=_base(layout.test))
            return (
                f"{said}; where it is at the end of the name, as in {flat[0]}{_unpacked(label)}: {command} -- then "
                f"name {_beside(path)}"
            )
        return f"{said}; put them into {split.path}/<class>/"
    return "has no two splits"  # not reached: a pair with classes in both is a good one


def _classes(place: Place) -> list[Place]:
    """The folders of images in a folder."""
    return [folder for folder in place.folders.values() if folder.images]


def _listed(place: Place) -> str:
    """The folders of images in a folder, the first few, and the images that lie in it itself."""
    said = [f"{name}/ with {len(folder.images):,}" for name, folder in sorted(place.folders.items()) if folder.images]
    own = sum(is_image(name) for name in place.files)
    more = [f"{len(said) - SHOWN} more folders"] if len(said) > SHOWN else []
    return ", ".join(said[:SHOWN] + more + ([f"{own:,} in {_path(place)}"] if own else []))


def _plain(label: str) -> str:
    return label.partition(":")[2].rstrip("/")


def _beside(path: str) -> str:
    """The folder that the commands above make."""
    return os.path.normpath(os.path.join(path, "..", "split"))


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[\w@%+=:,./~-]+", path) else "'" + path.replace("'", "'\\''") + "'"


def _unpacked(label: str) -> str:
    return " (unpacked first)" if re.search(r"\.(tar|tgz|tar\.\w+|zip)$", label) else ""


def outside(root: Place, layout: Layout) -> dict[str, dict[str, File]]:
    """Images that are in neither split, by the folder that they are in: what another split has, for one."""
    left: dict[str, dict[str, File]] = {}
    for place in root.below:
        if place in (layout.train, layout.test) or _is_below(place, layout.train) or _is_below(place, layout.test):
            continue
        own = {name: file for name, file in place.files.items() if is_image(name)}
        if own:
            inside = place.path.removeprefix(layout.parent.path).lstrip("/") if layout.parent.path else place.path
            top = place.name() if not inside else inside.split("/")[0]
            left.setdefault(top, {}).update({place.name(name): file for name, file in own.items()})
    return left


def _is_below(place: Place, split: Place) -> bool:
    return place.path.startswith(f"{split.path}/")
