"""What a failed write says: a full disk, a quota, a folder of somebody else."""

from __future__ import annotations

import errno
from pathlib import Path

from tokenize_data.errors import UserError


def disk_error(error: OSError, root: Path) -> UserError:
    place = error.filename or root
    remedies = {
        errno.ENOSPC: "free some space, or give another --tokenized_data_dir; nothing unfinished was left behind",
        errno.EDQUOT: "your quota is used up: free some space, or give another --tokenized_data_dir",
        errno.EFBIG: "the file size limit (ulimit -f) is too small: raise it, or give another --tokenized_data_dir",
        errno.EACCES: "you may not write there: give a --tokenized_data_dir of your own",
        errno.EROFS: "you may not write there: give a --tokenized_data_dir of your own",
        errno.ENOTDIR: "a part of that path is a file: give another --tokenized_data_dir",
        errno.EEXIST: "a part of that path is a file: give another --tokenized_data_dir",
    }
    return UserError(
        f"cannot write {place}: {error.strerror or error}: {remedies.get(error.errno or 0, 'check the disk')}"
    )
