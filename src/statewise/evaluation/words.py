"""The vocabulary of the skills: plain English words that the generators combine.

The lists are part of what the demo model was trained on; changing an entry changes the skills.
"""

ADJECTIVES = tuple(
    """red blue green yellow black white brown grey golden silver old new small large heavy light round square
    long short wooden iron paper glass broken painted plain royal quiet bright dark soft hard warm cold wet dry
    narrow wide tall thin thick empty folded hidden wild gentle simple""".split()
)

NOUNS = tuple(
    """lamp table chair book key door box bottle clock mirror basket hammer knife spoon plate cup bowl pot kettle
    blanket pillow carpet curtain candle pencil letter map flag drum bell horn violin piano guitar ball kite boat
    wagon saddle rope ladder bucket shovel axe saw needle thread ring coat hat glove boot scarf belt apron purse
    coin stamp picture statue vase tray jar""".split()
)

ROOMS = tuple(
    """kitchen garden cellar attic library hall bedroom office garage stable tower chapel bakery cabin tent
    harbour market museum school theatre""".split()
)

FIRST_NAMES = tuple(
    """Anna Peter Maria Thomas Clara Henry Emma Paul Julia Simon Alice Oscar Nora David Laura Martin Helen Victor
    Sarah Robert Lucy Felix Irene Daniel Rosa Adam Eva George Ida Hugo Jane Leon Mary Noah Olga Philip Ruth Samuel
    Tina Walter""".split()
)

LAST_NAMES = tuple(
    """Miller Baker Carter Cooper Fisher Fletcher Gardner Hunter Mason Porter Potter Turner Walker Weaver Wood
    Brook Field Hill Lake Stone Banks Bell Bird Black Brown Frost Gray Green King Knight Long Marsh Moore North
    Page Rose Sharp Swift White Young""".split()
)

CITIES = tuple(
    """London Paris Rome Berlin Madrid Vienna Oslo Dublin Lisbon Athens Prague Warsaw Moscow Cairo Tokyo Delhi
    Boston Chicago Denver Dallas Toronto Sydney Geneva Venice Florence Hamburg Bergen Lima Havana Quebec""".split()
)

JOBS = tuple(
    """teacher doctor farmer sailor painter lawyer soldier nurse judge driver pilot writer singer dancer
    carpenter gardener tailor butcher printer clerk""".split()
)

THINGS = tuple(
    """apple pear plum cherry lemon orange grape peach bread butter cheese honey sugar salt milk water tea coffee
    rice bean corn onion garlic pepper horse cow sheep goat pig dog cat mouse rabbit fox bear wolf lion tiger eagle
    owl crow duck goose swan fish whale seal crab frog snake bee ant spider tree leaf flower grass river lake sea
    hill stone sand rain snow wind cloud sun moon star fire smoke iron gold silver copper glass wood paper cloth
    wool silk rope nail wheel bridge road house wall roof window tower street city village farm field forest
    island beach desert valley mountain""".split()
)

VOCABULARY = frozenset((*ADJECTIVES, *NOUNS, *ROOMS, *FIRST_NAMES, *LAST_NAMES, *CITIES, *JOBS, *THINGS))
