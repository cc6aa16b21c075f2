# SPDX-License-Identifier: Apache-2.0
"""Small programs: ``python -m nbdwire info|list|map|copy|serve``. They import no more than nbdwire.

Exit status: 0, it is done; 1, it is not, and one line on stderr says why; 2, a wrong command line;
3, the answer of ``info --can`` or ``--is`` is no; 130, interrupted (SIGINT).
"""
