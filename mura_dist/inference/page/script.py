"""What Streamlit runs at each change of a session; everything lies in app.py, which is loaded once."""

from mura_dist.inference.page.app import show
from mura_dist.inference.page.server import page_context

if __name__ == "__main__":  # a reading process that starts anew imports this file, and shows nothing
    show(page_context())
