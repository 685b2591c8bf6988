"""For schemathesis: makes some of its requests ones about what is there, which it can't guess.

PGSTRATA_KNOWN is JSON: names, timelines, tenants and LSNs of a cluster's branches. The other requests stay as they are, but
that no branch is asked for an LSN of the far future: whoever does waits for a minute, as is said.
"""

import json
import os
import random
import re

import schemathesis

KNOWN = json.loads(os.environ["PGSTRATA_KNOWN"])
RELATIONS = ["1663/5/1259", "1664/0/1262", "1663/5/1249.vm", "1663/5/1259_fsm", "1663/5/99999", "1663/5/1259.init"]
BLOCKS = [0, 1, 2, 4294967295]
TIMES = ["2000-01-01T00:00:00Z", "2100-01-01T00:00:00Z", "2026-01-31T12:00:00+23:59", "9999-12-31T23:59:59.999999999Z"]
LSN = re.compile("[0-9A-Fa-f]{1,8}/[0-9A-Fa-f]{1,8}")
RANDOM = random.Random(4)
made = []


def new_name():
    """A name that no branch has. It may be asked for from now on, whether or not a branch gets it."""
    made.append(f"made-{len(made)}")
    return made[-1]


def some(of, operation):
    """One of the branches: those of one half are never renamed or deleted here, so that there is always something."""
    half = len(KNOWN[of]) // 2
    destroys = operation.method.upper() == "DELETE" or operation.path.endswith("/rename")
    return RANDOM.choice(KNOWN[of][half:] if destroys else KNOWN[of][:half])


def a_name(operation):
    return RANDOM.choice(made) if made and RANDOM.random() < 0.2 else some("names", operation)


def good(parameter, operation):
    choices = {
        "lsn": KNOWN["lsns"],
        "at_least": KNOWN["lsns"],
        "rel": RELATIONS,
        "block": BLOCKS,
        "seconds": [0, 1],
        "sizes": ["true", "false"],
        "time": TIMES,
        "tenant": KNOWN["tenants"],
        "timeline": [some("timelines", operation)],
        "tenant_id": KNOWN["tenants"],
        "timeline_id": [some("timelines", operation)],
        # Those that they have, and those that there are not: who keeps the WAL meanwhile is another test's.
        "nodes": ["1,2,3", "3,1,2", "1,2,9", "x", ","],
        "force": ["true", "false"],
        "after": [0, 1, 2, 1 << 40],
        # All of them are there: nothing is to be given up.
        "survivors": ["1", "1,2", "2,9", "x", ""],
        "newcomers": ["", "1,2,3", "9", "x"],
    }
    if parameter in ("to", "name"):
        return new_name() if parameter == "to" else a_name(operation)
    return RANDOM.choice(choices[parameter])


def new_branch(operation):
    moments = [{}] + [{name: good(name, operation)} for name in ("lsn", "time", "at_least")]
    name, replace = RANDOM.choice([(new_name(), False), (RANDOM.choice(made), True), (a_name(operation), False)])
    return {"name": name, "from": a_name(operation), "replace": replace, **RANDOM.choice(moments)}


def forget_the_future(fields, operation):
    for name in ("lsn", "at_least"):
        if isinstance(fields, dict) and LSN.fullmatch(str(fields.get(name))):
            fields[name] = good(name, operation)


@schemathesis.hook
def before_call(context, case, kwargs):
    operation = case.operation
    forget_the_future(case.query, operation)
    forget_the_future(case.body, operation)
    if RANDOM.random() < 0.4:
        return
    described = {parameter.name: parameter for parameter in operation.query}
    if described:
        chosen = [name for name, one in described.items() if one.is_required or RANDOM.random() < 0.5]
        query = {name: good(name, operation) for name in chosen}
        # Something that is odd, where the rest is not.
        if isinstance(case.query, dict) and RANDOM.random() < 0.2:
            query.update(list(case.query.items())[:1])
        case.query = query
    if operation.path.startswith("/v1/timelines/"):
        case.path_parameters = {"id": good("timeline", operation)}
    # A wait that is given up.
    if operation.path == "/v1/branch/wait" and RANDOM.random() < 0.2:
        case.query = {"name": a_name(operation), "lsn": "FFFFFFFF/FFFFFFFF", "seconds": RANDOM.choice([0, 1])}
    if operation.path == "/v1/branches" and case.method.upper() == "POST":
        case.body = new_branch(operation)
