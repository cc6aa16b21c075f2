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
AT_L1_SIZE: Final = 36
AT_REFCOUNT_TABLE: Final = 48
AT_INCOMPATIBLE: Final = 72
AT_AUTOCLEAR: Final = 88

# Incompatible features
INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
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

# L1 and L2 entries
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1 << 0
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
L2_RESERVED: Final = 0x3F000000000001FE

# Kinds of guest cluster. NORMAL may be written in place; SHARED is data with another reference
# somewhere (no COPIED flag), which a write must leave alone.
UNALLOCATED: Final = 0
ZERO_PLAIN: Final = 1
ZERO_ALLOC: Final = 2
NORMAL: Final = 3
SHARED: Final = 4
PACKED: Final = 5  # compressed

# Limits
MIN_CLUSTER_BITS: Final = 9
MAX_CLUSTER_BITS: Final = 21
MAX_SIZE: Final = (1 << 63) - 1
MAX_L1_BYTES: Final = 32 << 20
MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
MAX_BACKING_NAME: Final = 1023
MAX_SNAPSHOTS: Final = 65536
# Each layer of a chain takes three Python frames of a read.
MAX_CHAIN_DEPTH: Final = 200
