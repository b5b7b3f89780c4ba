"""Run by Streamlit at each change in a session. The code is in app.py, which is imported once."""

from mura_dist.inference.page.app import show
from mura_dist.inference.page.server import page_context

if __name__ == "__main__":  # a worker process that restarts imports this file too
    show(page_context())
