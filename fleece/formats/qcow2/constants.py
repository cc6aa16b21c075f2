# SPDX-License-Identifier: Apache-2.0
"""The numbers of the qcow2 format, and the limits within which an image is believed.

Source: QEMU's ``docs/interop/qcow2``, sections "Header", "Refcount tables", "L1 and L2 table
entries". The limits are QEMU's, so that each program opens what the other one makes.
"""

from typing import Final

MAGIC: Final = 0x514649FB  # "QFI" and 0xfb
V2_HEADER_LENGTH: Final = 72
V3_HEADER_LENGTH: Final = 112  # what is written; 104 is the least that is read
V3_MIN_HEADER_LENGTH: Final = 104

# Places in the header of the fields that are changed in an open image
AT_BACKING_OFFSET: Final = 8
AT_SIZE: Final = 24
AT_L1_SIZE: Final = 36
AT_REFCOUNT_TABLE: Final = 48
AT_SNAPSHOTS: Final = 60
AT_INCOMPATIBLE: Final = 72
AT_AUTOCLEAR: Final = 88

# Incompatible features
INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
KNOWN_INCOMPATIBLE: Final = 0x1F
# Compatible features
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
# Autoclear features
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA_FILE: Final = 1 << 1

# Header extensions
EXT_END: Final = 0
EXT_BACKING_FORMAT: Final = 0xE2792ACA
EXT_FEATURE_NAMES: Final = 0x6803F857
EXT_BITMAPS: Final = 0x23852875
EXT_CRYPTO: Final = 0x0537BE77
EXT_DATA_FILE: Final = 0x44415441

# Compression types, encryption methods
COMPRESSION_DEFLATE: Final = 0
COMPRESSION_ZSTD: Final = 1
CRYPT_NONE: Final = 0
CRYPT_AES: Final = 1
CRYPT_LUKS: Final = 2

# L1 and L2 entries
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
L2_RESERVED: Final = 0x3F000000000001FE
SUBCLUSTERS: Final = 32  # of a cluster, with extended L2 entries
# The second word of such an entry: bit x says that subcluster x has data, bit 32 + x that it is
# zero.
ALL_ALLOCATED: Final = 0xFFFFFFFF
ALL_ZERO: Final = 0xFFFFFFFF << 32
BITS_OF_FIRST: Final = 1 << 32 | 1

# Kinds of guest cluster. NORMAL may be written in place; SHARED is data with another reference
# somewhere (no COPIED flag), which a write must leave alone.
UNALLOCATED: Final = 0
ZERO_PLAIN: Final = 1
ZERO_ALLOC: Final = 2
NORMAL: Final = 3
SHARED: Final = 4
PACKED: Final = 5  # compressed
UNALLOCATED_OWN: Final = 6  # a subcluster without data in a cluster that has its place
DELAYED: Final = 7  # was written, and no table says so yet (`fleece.formats.qcow2.pending`)
KINDS_WITH_A_PLACE: Final = frozenset((ZERO_ALLOC, NORMAL, SHARED, UNALLOCATED_OWN))
KINDS_WITHOUT_A_PLACE: Final = frozenset((UNALLOCATED, ZERO_PLAIN, SHARED, PACKED))
KINDS_IN_FILE: Final = frozenset((NORMAL, SHARED, DELAYED))
KINDS_OF_ZEROES: Final = frozenset((ZERO_PLAIN, ZERO_ALLOC))
KINDS_UNALLOCATED: Final = frozenset((UNALLOCATED, UNALLOCATED_OWN))

# Limits
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MIN_EXTENDED_CLUSTER_BITS: Final = 14
MAX_SIZE: Final = (1 << 63) - 1
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_BACKING_NAME: Final = 1023
MAX_SNAPSHOTS: Final = 65536
# Each layer of a chain takes three Python frames of a read.
MAX_CHAIN_DEPTH: Final = 200
