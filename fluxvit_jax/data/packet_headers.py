"""What the headers of a video's packets tell without decoding them.

Which packets none of the other pictures needs: these can be left out of decoding, which a decoder
itself may not offer (dav1d takes such a setting only once, before the first packet). Whatever
cannot be told counts as needed. In VP9 every frame is: it hands on probabilities and motion also
where no picture refers to it. And whether packets are one frame each, where a codec allows others.

Sources: ITU-T H.264, 7.4.1; ITU-T H.265, table 7-1; AV1 Bitstream and Decoding Process
Specification, 5.5 and 5.9; ISO/IEC 14496-2 (MPEG-4 part 2), 6.2.3 and 6.2.5.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av

# Decoders of codecs whose packets are one frame each.
SINGLE_FRAMES = {"h264", "hevc", "vp9", "libvpx-vp9", "av1", "libdav1d"}
# Types of NAL units: parts of pictures, and what goes with a picture and says nothing of others:
# supplementary information, delimiters, filler.
H264_SLICES, H264_REST = range(1, 6), (6, 9, 12)
HEVC_SLICES, HEVC_REST = range(32), (35, 38, 39, 40)
HEVC_UNREFERENCED = {0, 2, 4, 6, 8}  # TRAIL_N, TSA_N, STSA_N, RADL_N, RASL_N
AV1_SEQUENCE, AV1_HEADERS = 1, (3, 6)  # types of OBUs: sequence header; frame header, whole frame
AV1_KEY, AV1_INTRA, AV1_SWITCH = 0, 2, 3  # types of frames
MPEG4_LAYER = range(0x20, 0x30)  # start codes: of a video object layer, of a picture (VOP)
MPEG4_PICTURE = b"\0\0\1\xb6"
MPEG4_BIDIRECTIONAL = 2  # coding type of pictures that are never referenced
BY_FRAME = 2  # of a setting of an AV1 sequence: each frame says it


class Headers(NamedTuple):
    """What the headers of a stream's packets tell.

    are_single_frames: whether every packet is known to be one frame. Packets of MPEG-4 part 2 may
        hold two, or a picture that is "not coded" and that a decoder puts out nothing for.
    unreferenced: numbers of packets without which all others decode to the same pictures.
    """

    are_single_frames: bool
    unreferenced: set[int]


def read_headers(packets: Sequence[av.Packet], codec: str, extradata: bytes | None) -> Headers:
    """packets: of one stream of an mp4 or Matroska file, whose codec and extradata they are."""
    extradata = extradata or b""
    unreferenced: set[int] = set()
    are_single_frames = codec in SINGLE_FRAMES
    try:
        if codec == "h264" and _is_configuration(extradata, 7):
            unreferenced = _of_h264(packets, _length_bytes(extradata, 4))
        elif codec == "hevc" and _is_configuration(extradata, 23):
            unreferenced = _of_hevc(packets, _length_bytes(extradata, 21))
        elif codec in ("av1", "libdav1d") and _is_configuration(extradata, 5):
            unreferenced = _of_av1(packets, extradata)
        elif codec == "mpeg4":
            kinds = _mpeg4_kinds(packets, extradata)
            are_single_frames = bool(kinds)
            unreferenced = {n for n, kind in enumerate(kinds) if kind == MPEG4_BIDIRECTIONAL}
    except (IndexError, ValueError):  # damaged headers; the decoder says what is wrong
        pass
    return Headers(are_single_frames, unreferenced)


def _of_h264(packets: Sequence[av.Packet], length_bytes: int) -> set[int]:
    """Those all of whose slices have nal_ref_idc 0."""

    def is_unreferenced(packet: av.Packet) -> bool:
        data, has_slices = memoryview(packet), False
        for start in _nal_units(data, length_bytes):
            kind, is_reference = data[start] & 31, data[start] >> 5 & 3
            if kind in H264_SLICES and not is_reference:
                has_slices = True
            elif kind not in H264_REST:
                return False
        return has_slices

    return {number for number, packet in enumerate(packets) if is_unreferenced(packet)}


def _of_hevc(packets: Sequence[av.Packet], length_bytes: int) -> set[int]:
    """Sub-layer non-reference pictures of the highest temporal layer.

    A picture is a reference only in its own temporal layer and in higher ones, and one of these
    types is none in its own.
    """
    unreferenced: dict[int, int] = {}  # packet -> temporal layer
    highest = 0
    for number, packet in enumerate(packets):
        data, kinds, layer = memoryview(packet), set[int](), 0
        for start in _nal_units(data, length_bytes):
            kind, view = data[start] >> 1, (data[start] & 1) << 5 | data[start + 1] >> 3
            if kind not in HEVC_REST:
                kinds.add(kind)
            if kind in HEVC_SLICES:
                if view:  # a second view, such as of stereo, may use pictures of the first
                    return set()
                layer = max(layer, data[start + 1] & 7)
        if kinds and kinds <= HEVC_UNREFERENCED:
            unreferenced[number] = layer
        highest = max(highest, layer)
    return {number for number, layer in unreferenced.items() if layer == highest}


def _of_av1(packets: Sequence[av.Packet], extradata: bytes) -> set[int]:
    """Those none of whose frames is stored in a slot from which later ones could take it."""
    sequence = None
    for kind, unit in _obus(memoryview(extradata)[4:]):
        if kind == AV1_SEQUENCE:
            sequence = _av1_sequence(_Bits(unit))
    found = set()
    for number, packet in enumerate(packets):
        stored = []
        for kind, unit in _obus(memoryview(packet)):
            if kind == AV1_SEQUENCE and _av1_sequence(_Bits(unit)) != sequence:
                return set()
            if kind in AV1_HEADERS and sequence is not None:
                stored.append(_av1_is_stored(_Bits(unit), sequence))
        if stored and not any(stored):
            found.add(number)
    return found


# ---------------------------------------------------------------------------------------------
# Units of a packet


def _is_configuration(extradata: bytes, size: int) -> bool:
    """Whether extradata are of an mp4's kind, version 1, and not of a raw stream's."""
    return len(extradata) >= size and extradata[0] & 127 == 1


def _length_bytes(extradata: bytes, place: int) -> int:
    return (extradata[place] & 3) + 1


def _nal_units(data: memoryview, length_bytes: int) -> Iterator[int]:
    """Where NAL units of H.264 and HEVC start, each behind its length; ValueError for damage."""
    place, end = 0, len(data)
    while place < end:
        start = place + length_bytes
        place = start + int.from_bytes(data[place:start], "big")
        if not start < place <= end:
            raise ValueError("a NAL unit without end")
        yield start


def _obus(rest: memoryview) -> Iterator[tuple[int, memoryview]]:
    """OBUs of AV1: (type, content). Raises ValueError for damage."""
    while rest:
        head = rest[0]
        place, size = 2 if head & 4 else 1, 0
        if not head & 2:  # no size: the rest of the packet
            yield head >> 3 & 15, rest[place:]
            return
        for number in range(8):
            byte = rest[place + number]
            size |= (byte & 127) << 7 * number
            if not byte & 128:
                break
        place += number + 1
        if place + size > len(rest):
            raise ValueError("an OBU without end")
        yield head >> 3 & 15, rest[place : place + size]
        rest = rest[place + size :]


# ---------------------------------------------------------------------------------------------
# Headers of AV1


class _Bits:
    """Reads the beginning of a header bit by bit. Raises IndexError where the header ends."""

    def __init__(self, content: memoryview):
        head = content[:32]  # more than is read of any
        self._value, self._left = int.from_bytes(head, "big"), 8 * len(head)

    def take(self, count: int = 1) -> int:
        self._left -= count
        if self._left < 0:
            raise IndexError("a header without end")
        return self._value >> self._left & (1 << count) - 1


class _Sequence(NamedTuple):
    """What of a sequence header decides where a frame header has its refresh_frame_flags."""

    id_bits: int
    screen_content_tools: int
    integer_motion: int
    order_bits: int


def _av1_sequence(bits: _Bits) -> _Sequence:
    """Raises ValueError for still pictures, several operating points, and timing information."""
    bits.take(4)  # profile, still picture
    if bits.take():
        raise ValueError("a still picture")
    if bits.take():
        raise ValueError("timing information")
    has_delay = bits.take()
    if bits.take(5):
        raise ValueError("several operating points")
    bits.take(12)
    if bits.take(5) > 7:  # the level; high ones have a tier
        bits.take()
    if has_delay and bits.take():
        bits.take(4)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    bits.take(width_bits + height_bits)
    id_bits = bits.take(4) + 2 + bits.take(3) + 1 if bits.take() else 0
    bits.take(7)  # block size, intra filters, compound and warped prediction, dual filter
    has_order = bits.take()
    if has_order:
        bits.take(2)
    tools = BY_FRAME if bits.take() else bits.take()
    integer_motion = BY_FRAME
    if tools and not bits.take():
        integer_motion = bits.take()
    return _Sequence(id_bits, tools, integer_motion, bits.take(3) + 1 if has_order else 0)


def _av1_is_stored(bits: _Bits, sequence: _Sequence) -> bool:
    """Whether a frame is kept for others; so counts also one that shows a kept frame."""
    if bits.take():  # shows a kept frame
        return True
    kind, shown = bits.take(2), bits.take()
    if not shown:
        return True
    if kind in (AV1_KEY, AV1_SWITCH):
        return True
    resilient = bits.take()
    bits.take()  # whether it updates probabilities, which only a kept frame hands on
    tools = bits.take() if sequence.screen_content_tools == BY_FRAME else 0
    if (tools or sequence.screen_content_tools == 1) and sequence.integer_motion == BY_FRAME:
        bits.take()
    bits.take(sequence.id_bits)
    bits.take(1 + sequence.order_bits)  # whether it has a size of its own; its place in the order
    if kind != AV1_INTRA and not resilient:
        bits.take(3)
    return bits.take(8) != 0


# ---------------------------------------------------------------------------------------------
# Headers of MPEG-4 part 2


def _mpeg4_kinds(packets: Sequence[av.Packet], extradata: bytes) -> list[int]:
    """The coding type of the picture of each packet. Raises ValueError where one has none or two.

    Also where the header of the layer is not in extradata, and for objects that are no rectangles.
    """
    time_bits = _mpeg4_time_bits(extradata)
    return [_mpeg4_kind(bytes(packet), time_bits) for packet in packets]


def _mpeg4_kind(data: bytes, time_bits: int) -> int:
    start = data.find(MPEG4_PICTURE)
    if start < 0 or data.find(MPEG4_PICTURE, start + 4) >= 0:
        raise ValueError("a packet without exactly one picture")
    bits = _Bits(memoryview(data)[start + 4 :])
    kind = bits.take(2)
    while bits.take():  # full seconds
        pass
    bits.take(1 + time_bits + 1)
    if not bits.take():
        raise ValueError("a picture that is not coded")
    return kind


def _mpeg4_time_bits(extradata: bytes) -> int:
    """Bits of a picture's time, by the header of the layer. Raises ValueError without one."""
    starts = [
        place + 4
        for place in range(len(extradata) - 4)
        if extradata.startswith(b"\0\0\1", place) and extradata[place + 3] in MPEG4_LAYER
    ]
    if len(starts) != 1:
        raise ValueError("no header of a single layer")
    bits = _Bits(memoryview(extradata)[starts[0] :])
    bits.take(1 + 8)  # whether all pictures are key frames; type of the object
    if bits.take():  # version and priority
        bits.take(4 + 3)
    if bits.take(4) == 15:  # the aspect ratio is spelt out
        bits.take(8 + 8)
    if bits.take():  # control parameters: chroma, low delay, buffers
        bits.take(2 + 1)
        if bits.take():
            bits.take(79)
    if bits.take(2):
        raise ValueError("not rectangular")
    bits.take()
    return max(1, (bits.take(16) - 1).bit_length())
