"""What Streamlit is kept from: files on disks, sessions that stay, strangers asked. Each by replacing a piece of it, by name.

    keep(uploads in memory, few) forget(closed sessions, whole) tell_nobody(an address service)

A version that lacks one of the names is refused: it would go on without a word. tests/inference/page watches the effects.
"""

import asyncio
from typing import Any

from mura_dist.core.errors import UserError
from mura_dist.inference.page.study import MAX_FILES, MAX_UPLOAD_MB

MAX_UPLOADS_BYTES = 4 << 30  # of the uploads of all sessions together
RECONNECT_S = 20  # how long a session that was cut off is kept for its browser to come back


def apply_patches() -> None:
    """Before the server starts, in its process."""
    keep_uploads_in_memory()
    drop_closed_sessions()
    disable_address_lookup()


def keep_uploads_in_memory() -> None:
    """Starlette writes what is beyond 1 MiB of an upload to a temporary file; Streamlit takes any number of files, and
    one that ends after its session did. No further than memory, no more than a study has, none without a session, and no
    more than MAX_KEPT_BYTES of all sessions."""
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartParser
    from streamlit import runtime
    from streamlit.runtime.memory_uploaded_file_manager import MemoryUploadedFileManager

    _replace(MultiPartParser, "spool_max_size", 2 * MAX_UPLOAD_MB << 20)
    add_file = MemoryUploadedFileManager.add_file

    def bounded(self: Any, session_id: str, file: Any) -> None:
        if len(self.file_storage.get(session_id, {})) >= MAX_FILES:
            raise HTTPException(status_code=413, detail=f"more than {MAX_FILES} files")
        kept = sum(len(one.data) for files in list(self.file_storage.values()) for one in list(files.values()))
        if kept + len(file.data) > MAX_UPLOADS_BYTES:
            raise HTTPException(status_code=503, detail="the page holds too many uploads; try again in a minute")
        if not runtime.get_instance().is_active_session(session_id):
            raise HTTPException(status_code=400, detail="the session is closed")
        add_file(self, session_id, file)

    _replace(MemoryUploadedFileManager, "add_file", bounded)


def drop_closed_sessions() -> None:
    """Streamlit keeps the files of a closed session until another one is closed, if ever: they go after GONE_S here."""
    from streamlit import runtime
    from streamlit.runtime.memory_session_storage import MemorySessionStorage

    save = MemorySessionStorage.save

    def saved(self: Any, info: Any) -> None:
        save(self, info)
        asyncio.get_running_loop().call_later(RECONNECT_S, forget, self, info)

    def forget(self: Any, info: Any) -> None:
        if self.get(info.session.id) is not info:  # it has come back, or gone once more
            return
        self.delete(info.session.id)
        info.session.shutdown()
        for _ in range(2):  # what may be downloaded is marked by the first pass, and goes with the second
            runtime.get_instance().media_file_mgr.remove_orphaned_files()

    _replace(MemorySessionStorage, "save", saved)


def disable_address_lookup() -> None:
    """Ask nobody for this machine's address, as Streamlit does where another web site knocks."""
    from streamlit import net_util

    _replace(net_util, "get_external_ip", lambda: None)


def _replace(owner: Any, name: str, value: Any) -> None:
    if not hasattr(owner, name):
        import streamlit

        raise UserError(
            f"streamlit {streamlit.__version__} has no {owner.__name__}.{name}, without which uploads would not stay where they "
            "should; install the version that requirements.lock names"
        )
    setattr(owner, name, value)
