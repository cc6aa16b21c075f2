# SPDX-License-Identifier: Apache-2.0
"""The errors that users meet: what happened, to what, and what to do next.

::

    FleeceError                 code                  exit status
    ├── UsageError              usage                 2
    ├── ConfigError             config                3
    ├── NotFound                not-found             4
    ├── Busy                    busy                  5
    ├── AlreadyExists           exists                6
    ├── DaemonError             daemon                7    no daemon answers, or it went away
    ├── AddressError            address               8    a socket or port cannot be had
    ├── ImageError              image                 20
    │   ├── NotAnImage          not-an-image          21
    │   ├── UnsupportedFeature  unsupported-feature   22
    │   ├── ImageCorrupt        image-corrupt         23
    │   └── ImageInUse          image-in-use          24
    ├── SnapshotError           snapshot              30
    │   ├── SnapshotBroken      snapshot-broken       31
    │   └── DrainTimeout        drain-timeout         32
    ├── TrackingError           tracking              40
    ├── ControlError            control               60
    │   ├── CommandNotFound     command-not-found     61
    │   └── InvalidArgument     invalid-argument      62
    └── ClientError             client                70    a program could not be started

On the data path only ``OSError`` is raised; these are for the handshake, the control plane and
the command line. ``code`` is the word that scripts test (the ``--json`` field ``error``), the exit
status is that of the command line. Both are unique; a test walks the tree.
"""


class FleeceError(Exception):
    """Something went wrong that a user can understand. The text is one line."""

    code = "error"
    exit_status = 1


class UsageError(FleeceError):
    """The command line asks for something that cannot be."""

    code = "usage"
    exit_status = 2


class ConfigError(FleeceError):
    """A configuration file is wrong; the text names file, line and key."""

    code = "config"
    exit_status = 3


class NotFound(FleeceError):
    """There is no disk, snapshot, consumer or export of that name."""

    code = "not-found"
    exit_status = 4


class Busy(FleeceError):
    """Somebody uses it."""

    code = "busy"
    exit_status = 5


class AlreadyExists(FleeceError):
    """The name is taken."""

    code = "exists"
    exit_status = 6


class DaemonError(FleeceError):
    """No daemon answers at the control socket, or it went away."""

    code = "daemon"
    exit_status = 7


class AddressError(FleeceError):
    """A socket path or a port cannot be had."""

    code = "address"
    exit_status = 8


class ImageError(FleeceError):
    """An image cannot be used."""

    code = "image"
    exit_status = 20


class NotAnImage(ImageError):
    """It does not hold what its format demands."""

    code = "not-an-image"
    exit_status = 21


class UnsupportedFeature(ImageError):
    """A valid image with a feature that is not supported."""

    code = "unsupported-feature"
    exit_status = 22


class ImageCorrupt(ImageError):
    """Its metadata contradicts itself."""

    code = "image-corrupt"
    exit_status = 23


class ImageInUse(ImageError):
    """Another process has it open in a way that excludes ours."""

    code = "image-in-use"
    exit_status = 24


class SnapshotError(FleeceError):
    """A snapshot cannot be made or used."""

    code = "snapshot"
    exit_status = 30


class SnapshotBroken(SnapshotError):
    """Old data could not be saved: the snapshot is not the instant any more."""

    code = "snapshot-broken"
    exit_status = 31


class DrainTimeout(SnapshotError):
    """Requests in flight did not end in time; nothing was changed."""

    code = "drain-timeout"
    exit_status = 32


class TrackingError(FleeceError):
    """The record of changes cannot be used."""

    code = "tracking"
    exit_status = 40


class ControlError(FleeceError):
    """The control connection failed."""

    code = "control"
    exit_status = 60


class CommandNotFound(ControlError):
    """The daemon has no such command."""

    code = "command-not-found"
    exit_status = 61


class InvalidArgument(ControlError):
    """An argument is missing, unexpected or of the wrong type."""

    code = "invalid-argument"
    exit_status = 62


class ClientError(FleeceError):
    """A program that we were asked to run could not be started."""

    code = "client"
    exit_status = 70
