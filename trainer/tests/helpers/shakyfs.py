"""A file system that behaves as a bad NFS mount: slow, handles that go stale, and names that show late.

``python shakyfs.py FOLDER MOUNTPOINT [--late SECONDS]`` mirrors FOLDER by FUSE until it is unmounted. Each file's first
opening and first renaming, and each folder's first listing, fail with ESTALE; every fsync takes FSYNC seconds and every
opening OPEN. With --late, files that were made or renamed less than so long ago are not there yet (close-to-open).
"""

import argparse
import errno
import os
import sys
import time

import mfusepy as fuse

FSYNC, OPEN = 0.7, 0.05
TRIES = 2  # the kernel itself tries an opening again that was answered by ESTALE


class Shaky(fuse.Operations):
    """FOLDER, mirrored."""

    use_ns = True

    def __init__(self, root: str, late: float) -> None:
        self.root, self.late = root, late
        self.seen: dict[tuple[str, str], int] = {}

    def _real(self, path: str) -> str:
        real = self.root + path
        name = os.path.basename(path)
        can_be_late = self.late and name and not name.startswith(".") and os.path.isfile(real)
        if can_be_late and time.time() - os.stat(real).st_ctime < self.late:
            raise fuse.FuseOSError(errno.ENOENT)
        return real

    def _stale(self, what: str, path: str, tries: int = 1) -> None:
        count = self.seen[what, path] = self.seen.get((what, path), 0) + 1
        if count <= tries:
            raise fuse.FuseOSError(errno.ESTALE)

    def getattr(self, path, fh=None):
        status = os.lstat(self._real(path))
        keys = ["st_mode", "st_ino", "st_nlink", "st_uid", "st_gid", "st_size", "st_atime", "st_mtime", "st_ctime"]
        return {key: getattr(status, key) for key in keys}

    def readdir(self, path, fh):
        self._stale("list", path)
        found = [".", ".."]
        for name in os.listdir(self.root + path):
            try:
                self._real(os.path.join(path, name))
                found.append(name)
            except OSError:
                continue
        return found

    def open(self, path, flags):
        time.sleep(OPEN)
        real = self._real(path)
        if not os.path.basename(path).startswith("."):
            self._stale("open", path, TRIES)
        return os.open(real, flags)

    def create(self, path, mode, fi=None):
        return os.open(self.root + path, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def fsync(self, path, datasync, fh):
        time.sleep(FSYNC)
        os.fsync(fh)
        return 0

    def release(self, path, fh):
        os.close(fh)
        return 0

    def rename(self, old, new):
        self._stale("rename", new)
        os.rename(self.root + old, self.root + new)

    def truncate(self, path, length, fh=None):
        os.truncate(self.root + path, length)

    def unlink(self, path):
        os.unlink(self.root + path)

    def mkdir(self, path, mode):
        os.mkdir(self.root + path, mode)

    def chmod(self, path, mode):
        os.chmod(self.root + path, mode)

    def utimens(self, path, times=None):
        os.utime(self.root + path, ns=times)

    def statfs(self, path):
        status = os.statvfs(self.root + path)
        names = ["bavail", "bfree", "blocks", "bsize", "favail", "ffree", "files", "flag", "frsize", "namemax"]
        return {f"f_{name}": getattr(status, f"f_{name}") for name in names}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("mountpoint")
    parser.add_argument("--late", type=float, default=0.0)
    args = parser.parse_args()
    shaky = Shaky(os.path.abspath(args.folder), args.late)
    # No caches: the next look must come here.
    fuse.FUSE(shaky, args.mountpoint, foreground=True, attr_timeout=0, entry_timeout=0, big_writes=True)
    sys.exit(0)
