"""Comparison of data sources: class names, shared videos, and changes since an earlier run."""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from fluxvit_jax.data.annotations import open_source, read_class_names
from fluxvit_jax.data.class_names import KnownNames, normalized
from fluxvit_jax.data.prepared_source import is_prepared, split_of
from fluxvit_jax.data.sources import Source, labels_of
from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.hosts import check_same
from fluxvit_jax.errors import UserError

MAX_COUNTED_CLASSES = 100_000  # above, a label is rather an identifier: other columns, a wrong list


def common_class_names(known: Mapping[str, Sequence[str] | None]) -> tuple[str, ...] | None:
    """The class names that all origins agree on, as the first spells them; None if none has any.

    A label is a number, so two sources that name their classes differently, or in another order,
    mean different things by it. Case, blanks, underscores and hyphens make no difference.

    known: origin, as errors name it -> class names in the order of the labels, or None.

    Raises UserError where two differ.
    """
    named = {origin: tuple(names) for origin, names in known.items() if names}
    if not named:
        return None
    (first, reference), *others = named.items()
    for origin, names in others:
        if len(names) != len(reference):
            raise UserError(
                f"{origin}: names {len(names)} classes where {first} names {len(reference)}"
            )
        for label, (name, expected) in enumerate(zip(names, reference, strict=True)):
            if normalized(name) != normalized(expected):
                raise UserError(
                    f"{origin}: class {label} is {name!r}, but {first} calls it {expected!r}; "
                    "labels are numbers, so both must have the same classes in the same order"
                )
    return reference


def configured_class_names(path: str, classes: int) -> tuple[str, ...] | None:
    """The names that `config.data.class_names` stands for; None if it is empty.

    Raises UserError if the file cannot be read or has another number of names than `classes`.
    """
    if not path:
        return None
    names = read_class_names(path)
    if len(names) != classes:
        raise UserError(
            f"config.data.class_names: {path} has {len(names)} names for "
            f"config.model.classes={classes}"
        )
    return names


def configured_names(config: ConfigDict) -> KnownNames | None:
    """`configured_class_names` of a config, to look labels up; None without any."""
    names = configured_class_names(config.data.class_names, config.model.classes)
    return (
        KnownNames(names, f"config.data.class_names={config.data.class_names}") if names else None
    )


def count_classes(config: ConfigDict) -> ConfigDict:
    """The config with `model.classes` as many as its data have, where it is 0.

    They are those of `data.class_names`, else of the names or numbers in `data.train`.

    Raises UserError: there is nothing to count, or it cannot be read.
    """
    if config.model.classes:
        return config
    if config.data.class_names:
        classes = len(read_class_names(config.data.class_names))
    elif config.data.train:
        classes = _counted(config)
    else:
        raise UserError(
            "no data to count the classes of: add --config.data.train=LIST, or say how many with "
            "--config.model.classes=NUMBER"
        )
    counted = config.copy_and_resolve_references()
    counted.model.classes = classes
    return counted


def _counted(config: ConfigDict) -> int:
    """The number of classes that `data.train` has, and a line if some of them have no video."""
    path = config.data.train
    source = open_source(path, config.data.root, multi_label=config.train.multi_label)
    classes = source.classes
    if classes > MAX_COUNTED_CLASSES:
        raise UserError(
            f"{path}: has label {classes - 1}, but labels count from 0; for so many classes add "
            f"--config.model.classes={classes}"
        )
    if source.labels is not None:
        present = {label for labels in source.labels for label in labels_of(labels)}
        if absent := classes - len(present):
            say(f"{path}: {absent} of its {classes} classes have no video; labels count from 0")
    return classes


def open_compared(
    path: str, field: str, config: ConfigDict, known: KnownNames | None, reference: str
) -> Source:
    """Videos of `config.FIELD` whose labels must mean the classes of `reference`.

    known: the names of these classes; None where they have only numbers.

    Raises UserError: as `open_source`; a list or class folders have names, and the classes none.
    """
    source = open_source(
        path,
        config.data.root,
        config.model.classes,
        known=known,
        multi_label=config.train.multi_label,
    )
    if known is None and source.class_names and _is_sorted(path):
        raise UserError(
            f"config.{field}={path}: its labels are names, but {reference} has numbers only; say "
            "which is which: --config.data.class_names=FILE, a name a line"
        )
    return source


def open_validation(config: ConfigDict, training: Source) -> Source:
    """The videos of `data.validation`, whose names are looked up among those of training.

    Raises UserError: as `open_compared`; it has numbers where training has names.
    """
    train, validation = config.data.train, config.data.validation
    reference, known = f"config.data.train={train}", configured_names(config)
    if training.class_names and not known:
        known = KnownNames(training.class_names, reference)
    source = open_compared(validation, "data.validation", config, known, reference)
    unordered = training.class_names and _is_sorted(train) and not config.data.class_names
    if unordered and not source.class_names:
        raise UserError(
            f"config.data.validation={validation}: its labels are numbers, but those of "
            f"{reference} are names; write names in both"
        )
    return source


def _is_sorted(path: str) -> bool:
    """Whether classes are numbered in the order of their names; prepared folders keep theirs."""
    return not is_prepared(split_of(path)[0])


def describe_data(
    config: ConfigDict, training: Source, validation: Source | None
) -> dict[str, Any]:
    """The description of a run's data that its checkpoints keep, as JSON.

    {"training": `Source.identity`, "validation": likewise or None, "class_names": [...] or None}

    Raises UserError where the class names of the two and of `config.data.class_names` differ.
    """
    names = common_class_names(
        {
            f"config.data.train={config.data.train}": training.class_names,
            "config.data.class_names": configured_class_names(
                config.data.class_names, config.model.classes
            ),
            f"config.data.validation={config.data.validation}": (
                validation.class_names if validation is not None else None
            ),
        }
    )
    return {
        "training": training.identity,
        "validation": validation.identity if validation is not None else None,
        "class_names": names and list(names),
    }


def data_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The reason, in a few words, why a run cannot resume on this data; None if it can.

    before, now: as `describe_data` gives them; a run of an earlier version has only the number of
        its videos: {"videos": number}.
    """
    training = before.get("training") or {"videos": before["videos"]}
    if difference := identity_difference(training, now["training"]):
        return difference
    frozen = now.get("frozen", {})
    for name, checksum in before.get("frozen", {}).items():
        if name in frozen and frozen[name] != checksum:
            return f"other weights of the frozen {name}"
    try:
        common_class_names({"now": now["class_names"], "before": before.get("class_names")})
    except UserError as error:
        return str(error)
    return None


def shared_videos(one: Source, other: Source) -> int:
    """Number of videos that are in both; 0 where only reading all of them would tell."""
    files, others = one.files, other.files
    return 0 if files is None or others is None else len(set(files) & set(others))


def identity_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The difference of two `Source.identity`s in a few words; None if they are equal."""
    if before["videos"] != now["videos"]:
        return f"{now['videos']} videos instead of {before['videos']}"
    words = {
        "ids": "other videos, or the same in another order",
        "labels": "other labels for the same videos",
        "captions": "other captions for the same videos",
        "conversations": "other conversations about the same videos",
        "content": "other videos or labels",
    }
    for name, difference in words.items():
        if name in before and name in now and before[name] != now[name]:
            return difference
    return None


def check_same_videos(**sources: Source | None) -> None:
    """Raises UserError, on all hosts, if hosts have different videos.

    sources: use, such as "training" -> source; None where there is none.
    """
    about: dict[str, int | list[str] | None] = {}
    for use, source in sources.items():
        if source is not None:
            about[f"number of {use} videos"] = len(source)
            about[f"list of {use} videos"] = source.ids
    check_same(about)
