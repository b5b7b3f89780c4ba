"""Patch Streamlit so that uploads stay in memory, closed sessions are deleted and no external service is asked.

Each patch replaces a named attribute. A version of Streamlit without that attribute is refused, since the patch would have no
effect. tests/inference/page checks the effects.
"""

import asyncio
from typing import Any

from mura_dist.core.errors import UserError
from mura_dist.inference.page.study import MAX_FILES, MAX_UPLOAD_MB

MAX_UPLOADS_BYTES = 4 << 30  # sum over all sessions
RECONNECT_S = 20  # how long a disconnected session waits for its browser to reconnect


def apply_patches() -> None:
    """Apply all patches. Call it in the server's process before the server starts.

    Raises:
        UserError: This version of Streamlit cannot be patched.
    """
    keep_uploads_in_memory()
    drop_closed_sessions()
    disable_address_lookup()


def keep_uploads_in_memory() -> None:
    """Keep uploads in memory, and limit their number per session and their total size.

    By default, Starlette writes uploads above 1 MiB to a temporary file. Streamlit accepts any number of files, and uploads
    that finish after their session closed.
    """
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartParser
    from streamlit import runtime
    from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager

    _replace(MultiPartParser, "spool_max_size", 2 * MAX_UPLOAD_MB << 20)
    add_file = MemoryUploadedFileManager.add_file

    def add_limited_file(self: Any, session_id: str, file: Any) -> None:
        if len(self.file_storage.get(session_id, {})) >= MAX_FILES:
            raise HTTPException(status_code=413, detail=f"more than {MAX_FILES} files")
        stored = [upload for files in list(self.file_storage.values()) for upload in list(files.values())]
        if sum(len(upload.data) for upload in stored) + len(file.data) > MAX_UPLOADS_BYTES:
            raise HTTPException(status_code=503, detail="the page holds too many uploads; try again in a minute")
        if not runtime.get_instance().is_active_session(session_id):
            raise HTTPException(status_code=400, detail="the session is closed")
        add_file(self, session_id, file)

    _replace(MemoryUploadedFileManager, "add_file", add_limited_file)


def drop_closed_sessions() -> None:
    """Delete the files of a closed session after RECONNECT_S. Streamlit keeps them until another session closes."""
    from streamlit import runtime
    from streamlit.runtime.memory_session_storage import MemorySessionStorage

    save = MemorySessionStorage.save

    def save_with_timeout(self: Any, info: Any) -> None:
        save(self, info)
        asyncio.get_running_loop().call_later(RECONNECT_S, drop, self, info)

    def drop(self: Any, info: Any) -> None:
        if self.get(info.session.id) is not info:  # it has reconnected, and may have closed again
            return
        self.delete(info.session.id)
        info.session.shutdown()
        for _ in range(2):  # the first pass marks downloadable files, the second removes them
            runtime.get_instance().media_file_mgr.remove_orphaned_files()

    _replace(MemorySessionStorage, "save", save_with_timeout)


def disable_address_lookup() -> None:
    """Keep Streamlit from asking an external service for this machine's address."""
    from streamlit import net_util

    _replace(net_util, "get_external_ip", lambda: None)


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        import streamlit

        raise UserError(
            f"streamlit {streamlit.__version__} cannot be patched to keep uploads private: it has no "
            f"{owner.__name__}.{name}. Install the version in requirements.lock."
        )
    setattr(owner, name, value)
