"""What Streamlit runs at each change of a session; everything lies in screen.py, which is loaded once."""

from mura_dist.page import serving
from mura_dist.page.screen import show

if __name__ == "__main__":  # a reading process that starts anew imports this file, and shows nothing
    show(serving())
