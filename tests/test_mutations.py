"""The table of `tests.mutations` follows the code: every text and every test it names is there."""

from tests.mutations import MUTATIONS, PACKAGE, ROOT


def test_texts_and_tests_of_mutations_are_there():
    wrong = []
    for mutation in (one for group in MUTATIONS.values() for one in group):
        file = ROOT / PACKAGE / mutation.file
        if not file.exists() or file.read_text().count(mutation.old) != 1:
            wrong.append(f"{mutation.name}: {mutation.file}")
        for node in mutation.tests:
            name, _, function = node.partition("::")
            test = ROOT / "tests" / name
            known = test.exists() and f"def {function.split('[')[0]}" in test.read_text()
            if not known:
                wrong.append(f"{mutation.name}: {node}")
    assert not wrong
