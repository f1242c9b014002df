"""What a test cannot do without."""

import pytest

from harlora.kernels import cpp

# Where there is a compiler and the extension does not serve all the same, test_build.py fails.
needs_extension = pytest.mark.skipif(bool(cpp.load_extension()), reason=cpp.load_extension())
