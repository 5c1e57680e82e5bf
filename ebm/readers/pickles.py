"""A reader of pickles that executes nothing, and takes time and memory in proportion to the file.

    rows, labels = read_pickle("data_batch_1", ["data", "labels"])
    classes = to_whole_numbers(labels)

It knows plain values and arrays of numbers, of any protocol, as Python 2 and 3 and numpy 1 and 2 wrote them.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar, Literal

import numpy as np

from ebm.readers.bounded import PathLike, make_printable, read_file

MAX_STEPS = 2_000_000  # instructions of a pickle; the labels of ImageNet's largest file take a tenth
MAX_KEY_BITS = 64  # of a whole number that is a key
ARRAY_TYPE = re.compile(r"[<>=|]?[biufcSUV]\d{1,6}|bool|u?int(?:8|16|32|64)|float(?:16|32|64)")

# The instructions that build plain values, by their names in the module pickle. Missing are those for sets, whose
# members would be hashed in depth, for other classes than the substitutes, and for what lies outside the file.
INSTRUCTIONS = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES
    BINBYTES8 BYTEARRAY8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM
    SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


def read_pickle(path: PathLike, keys: Sequence[str]) -> list[Any]:
    """Return the entries `keys` of a pickled dictionary; arrays are writable and in the byte order of this machine.

    Raises what `PlainUnpickler.load` raises. The values are of any plain type: check them before you walk through
    them, because a small file can hold lists in lists of more items than there are atoms.
    """
    contents = PlainUnpickler(io.BytesIO(read_file(path))).load()
    if not isinstance(contents, dict):
        raise ValueError("not a dictionary")
    by_name = {decode_text(key): value for key, value in contents.items()}
    if missing := [key for key in keys if key not in by_name]:
        raise ValueError(f"no entry {missing[0]!r}")
    values = [by_name[key] for key in keys]
    return [value.copy() if isinstance(value, PickledArray) else value for value in values]


def decode_text(value: Any) -> Any:
    """Return a value of a pickle as text if it is bytes, as the texts are that Python 2 wrote."""
    return value.decode("latin1") if isinstance(value, bytes) else value


def to_whole_numbers(value: Any) -> np.ndarray:
    """Return a value of a pickle as int64 (N,); raise ValueError unless it is a list or an array of whole numbers."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return value.astype(np.int64)
    if not isinstance(value, list | tuple) or not all(type(number) is int for number in value):
        raise ValueError("labels are not whole numbers")
    return np.array(value, np.int64)


def to_texts(value: Any) -> tuple[str, ...]:
    """Return a value of a pickle as printable texts; raise ValueError unless it is a list of texts."""
    texts = tuple(map(decode_text, value)) if isinstance(value, list | tuple) else ()
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("names are not text")
    return tuple(map(make_printable, texts))


class ForeignName(pickle.UnpicklingError):
    """A pickle that names a function or a class which has no place in a data file."""


def count_step(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the method for an instruction, which counts it first."""

    def step(self: PlainUnpickler) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise pickle.UnpicklingError(f"more than {MAX_STEPS:,} instructions")
        load(self)

    return step


def refuse_instruction(self: PlainUnpickler) -> None:
    """Refuse an instruction for which plain values have no use."""
    raise pickle.UnpicklingError("an instruction that plain values do not need")


# The Python version of the base class, because the C version reserves any memory that a file asks for.
class PlainUnpickler(pickle._Unpickler):
    """An unpickler of plain values and arrays of numbers, of any protocol.

    It calls nothing that a file names, because that could execute code: the names that arrays need have substitutes
    here, and all others are refused. No substitute copies bytes, so that a small file cannot fill the memory with them.
    Keys of dictionaries are texts and numbers, which can be hashed at once. Nothing here walks into nested values.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict.fromkeys(range(256), refuse_instruction)
    # Of the base class:
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: IO[bytes]):
        super().__init__(file, encoding="bytes")  # so that the arrays of Python 2 are bytes, too
        self.steps = 0
        self.encoded: dict[str, bytes] = {}
        self.substitutes: dict[str, Any] = {
            "numpy.ndarray": PickledArray,
            "numpy.dtype": PickledType,
            "numpy.core.multiarray._reconstruct": PickledArray,
            "numpy.core.multiarray.scalar": self.read_number,
            "numpy.core.numeric._frombuffer": self.view_array,  # protocol 5
            "_codecs.encode": self.encode_text,  # protocols 0 to 2
            "__builtin__.bytes": self.encode_text,
        }

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # of numpy 2 and of numpy 1
        if full_name not in self.substitutes:
            raise ForeignName(f"{full_name} has no place in a data file")
        return self.substitutes[full_name]

    def load_bytearray8(self) -> None:
        """Read an array of bytes, without reserving more than the file holds."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_setitem(self) -> None:
        """Add an entry to a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self.add_entries(self.stack[-1], [key, value])

    def load_setitems(self) -> None:
        """Add entries to a dictionary."""
        entries = self.pop_mark()
        self.add_entries(self.stack[-1], entries)

    def load_dict(self) -> None:
        """Make a dictionary of entries."""
        entries = self.pop_mark()
        self.append({})
        self.add_entries(self.stack[-1], entries)

    def add_entries(self, target: Any, entries: list[Any]) -> None:
        """Add keys and values, in turn, to a dictionary."""
        keys = entries[::2]
        is_plain = all(isinstance(key, str | bytes | int | float | None) for key in keys)
        if not is_plain or any(isinstance(key, int) and key.bit_length() > MAX_KEY_BITS for key in keys):
            raise pickle.UnpicklingError("a key of a dictionary is neither a text nor a number")
        if not isinstance(target, dict):
            raise pickle.UnpicklingError("entries without a dictionary")
        target.update(zip(keys, entries[1::2], strict=True))

    def load_reduce(self) -> None:
        """Call a substitute."""
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("a call without arguments")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self) -> None:
        """Give an array or a type its state; the attributes of a dictionary, which torch writes, are dropped."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, PickledArray | PickledType):
            target.set_state(state)
        elif not isinstance(target, dict):
            raise pickle.UnpicklingError("a state of nothing that has one")

    def encode_text(self, text: str = "", encoding: str = "latin1") -> bytes:
        """Return the bytes for which Python 3 wrote a text in Latin-1; those of equal texts are one object."""
        if not isinstance(text, str):
            raise pickle.UnpicklingError(f"bytes of a {type(text).__name__!r}")
        if text not in self.encoded:
            self.encoded[text] = text.encode("latin1")
        return self.encoded[text]

    def read_number(self, kind: PickledType, contents: bytes) -> Any:
        """Return one of numpy's numbers as a plain number."""
        return np.frombuffer(contents, kind.name, count=1).item()

    def view_array(
        self,
        contents: bytes | bytearray,
        kind: PickledType,
        shape: tuple[int, ...],
        order: str,
        axes: tuple[int, ...] | None = None,
    ) -> PickledArray:
        """Return an array over bytes; order: "C", "F" (the first axis varies fastest) or "K" (with permuted axes)."""
        array = PickledArray()
        array.lay(contents, kind, shape, "F" if order == "F" else "C")
        array.view = array.view.transpose(axes) if axes else array.view
        return array


for _name in INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _method = pickle._Unpickler.dispatch[_code].__name__
    PlainUnpickler.dispatch[_code] = count_step(getattr(PlainUnpickler, _method))


class PickledType:
    """A substitute for numpy.dtype that keeps name and byte order; numpy's own can be set to a state that crashes."""

    def __init__(self, name: str | bytes, *_: object):
        self.name = decode_text(name)
        if not isinstance(self.name, str) or not (self.name == "O8" or ARRAY_TYPE.fullmatch(self.name)):
            raise pickle.UnpicklingError("the type of an array is not a name")

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the pickled state."""
        if decode_text(state[1]) == ">":
            self.name = f">{self.name}"


class PickledArray:
    """A substitute for numpy.ndarray that accepts a shape, a number type and bytes only."""

    def __init__(self, *_: object):
        self.view = np.empty(0)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Lay the array over the bytes of its pickled state."""
        _, shape, kind, is_fortran, contents = state
        self.lay(contents, kind, shape, "F" if is_fortran else "C")

    def lay(
        self, contents: bytes | bytearray, kind: PickledType, shape: tuple[int, ...], order: Literal["C", "F"]
    ) -> None:
        """Lay the array over bytes."""
        self.view = np.frombuffer(contents, kind.name).reshape(shape, order=order)

    def copy(self) -> np.ndarray:
        """Return a writable array in the byte order of this machine."""
        return self.view.astype(self.view.dtype.newbyteorder("="), order="C")
