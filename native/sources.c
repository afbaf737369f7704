/* What the library was compiled from: setup.py's checksum of these files, which mixft/cpu/native.py compares. */
const char mixft_sources[] = MIXFT_SOURCES;
