from .context import Context as Context
from .ledger import Ledger as Ledger
from .start import Start as Start
from .state import State as State
from .trace import Selection as Selection
from .trace import Trace as Trace
from .trajectory import Trajectory as Trajectory
