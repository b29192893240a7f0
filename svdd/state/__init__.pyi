from .context import Context as Context
from .ledger import Ledger as Ledger
from .state import State as State
from .trace import Trace as Trace
