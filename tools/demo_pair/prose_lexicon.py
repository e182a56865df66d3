"""What the prose workload writes about, as data.

Fields are divided by `|`, the variants of a sentence by ` / `. {He} {he} {his} {him} stand for the person, {name},
{craft}, {tool}, {at} and {landmark} for what that prompt drew.
"""
# ruff: noqa: E501  (data, one entry a line)

# noun | where the work is done | tool | what was done that day | the craft
TRADES = """
baker | in the bakery | wooden peel | kneaded dough and slid loaves into the oven | baking bread
blacksmith | in the forge | hammer | shaped horseshoes and hinges on the anvil | working iron
carpenter | in the workshop | plane | cut joints for a long oak table | making furniture
clockmaker | at the bench | smallest screwdriver | cleaned the wheels of a stubborn clock | mending clocks
gardener | in the walled garden | spade | pruned the roses and turned the dark soil | tending flowers
fisherman | on the little boat | net | untangled lines and sorted the catch | catching herring
teacher | in the schoolroom | chalk | wrote long sums on the board | teaching children to read
nurse | on the ward | watch | changed bandages and listened to old stories | caring for the sick
tailor | in the narrow shop | pair of scissors | pinned the hem of a wedding dress | sewing coats
librarian | among the shelves | rubber stamp | sorted returned books into neat piles | looking after books
potter | at the wheel | wire | threw a row of tall jugs and set them to dry | making pots
painter | in the attic studio | brush | mixed blue and grey until they matched the sky | painting portraits
beekeeper | beside the hives | smoker | lifted the frames and checked the combs | keeping bees
postman | in the sorting room | leather bag | arranged the letters street by street | delivering letters
farmer | in the barn | pitchfork | filled the troughs and counted the sheep | raising sheep
violinist | in the rehearsal room | bow | practised the same difficult passage again and again | playing the violin
shoemaker | in the cellar shop | awl | stitched new soles to a pair of old boots | repairing shoes
weaver | at the loom | shuttle | wove a blanket of red and brown wool | weaving cloth
cook | in the kitchen | ladle | chopped onions and stirred a great pot of soup | cooking for strangers
glassblower | beside the furnace | long pipe | turned glowing glass into green bottles | blowing glass
bookbinder | in the back room | bone folder | glued leather to the spine of an old atlas | binding books
miller | in the mill | sieve | poured grain between the stones and filled the sacks | grinding flour
shepherd | on the hillside | crook | counted the flock and mended a gap in the fence | watching sheep
ferryman | on the ferry | pole | carried passengers and goats from one bank to the other | crossing the river
doctor | in the surgery | stethoscope | listened to one cough after another | healing people
bicycle mechanic | in the garage | spanner | straightened a bent wheel spoke by spoke | fixing bicycles
photographer | in the darkroom | camera | hung fresh prints on a line to dry | taking photographs
florist | behind the counter | ribbon | tied lilies and fern into heavy bouquets | arranging flowers
stonemason | in the yard | chisel | carved a row of letters into pale stone | cutting stone
barber | beside the mirror | razor | trimmed beards and heard the latest gossip | cutting hair
tea merchant | in the storeroom | brass scale | weighed small packets of black tea | blending tea
bell ringer | in the tower | rope | oiled the wheels and swept the narrow stairs | ringing the bells
cheesemaker | in the cool cellar | copper spoon | turned the wheels of cheese and salted them | making cheese
mapmaker | at the drawing table | pen | inked the line of a distant coast | drawing maps
lamplighter | at the foot of the stairs | ladder | filled the lamps with oil and trimmed the wicks | lighting lamps
puppeteer | behind the little stage | needle | sewed a velvet cloak for a wooden king | carving puppets
"""

# kind of place | landmark | what one sees there
KINDS = """
fishing village | the harbour wall | Gulls circled above the masts, and the air smelled of salt and tar. / Small boats knocked against each other like old friends.
market town | the market square | Carts rattled over the cobbles, and traders called out their prices. / Stalls of cheese and cloth stood in crooked rows.
mountain village | the old chapel | The peaks stood close around the roofs, and goat bells rang on the slopes. / A narrow road climbed past wooden houses with painted shutters.
seaside town | the pier | The waves came and went below the promenade, and flags snapped on their poles. / Rows of pale houses looked out over the water.
river town | the stone bridge | Barges slid by without a sound, and willows trailed in the current. / The river bent around the town like an arm.
city district | the tram stop | Trams hummed along the avenue, and people hurried by with their collars up. / Balconies full of washing leaned over the narrow streets.
desert town | the well | Beyond the last houses there was nothing but sand and a long straight road. / Mud walls glowed the colour of honey.
island village | the lighthouse | There was water on every side, and the ferry came only twice a week. / Paths of crushed shells ran between low white walls.
university town | the clock tower | Students crossed the courtyards with books under their arms. / Old colleges stood around lawns that nobody dared to walk on.
mining town | the closed pit | Rows of brick houses ran up the hill, each with its own thread of smoke. / Old rails still ran through the streets and led nowhere.
forest settlement | the sawmill | Tall pines pressed against the fences, and the air was full of resin. / Stacks of fresh planks lined the only road.
vineyard village | the wine press | Rows of vines ran down to the valley in perfect lines. / Barrels stood in front of every second door.
railway town | the station | Trains passed through at all hours, and few of them stopped. / The station clock was always three minutes fast.
spa town | the fountain | Guests in straw hats strolled from one bench to the next. / Steam rose from the springs behind the grand hotel.
border town | the customs house | Two languages could be heard on every corner, and often in one sentence. / Lorries waited in a long line at the gate.
garden suburb | the green | Hedges were cut straight, and every gate had a fresh coat of paint. / Children had drawn chalk animals along the pavement.
port | the docks | Cranes swung slowly over the ships, and sailors shouted from deck to quay. / Crates of oranges and tea stood in towers along the water.
farming village | the duck pond | Tractors had left brown tracks all along the main road. / Beyond the hedges the fields lay open as far as the hills.
"""

PLACES = (
    "Marrow Bay|Elmford|Kestrel Point|Oakhaven|Saint Orlan|Birchwick|Halden|Lowmere|Tarn Hollow|Verity Cross|Ashcombe|"
    "Port Linnet|Greywater|Millbrook|Sandrock|Cold Harbour|Fernley|Larkspur|Old Ambry|Pinewood|Quillon|Redcliff|"
    "Silverton|Thornbury|Upper Wells|Westmarch|Yarrow|Amberley|Brindle|Corran|Dunmore|Estrella|Fallow|Granby|Hollin|"
    "Iverness|Jasper Falls|Kingsbridge|Lantern Hill|Morrow"
).split("|")

# adjective | seasons | what the weather does
WEATHERS = """
foggy | autumn winter spring | Fog lay thick over {landmark}, and the nearest lamps were only pale smudges. / The fog had swallowed {landmark}, and every sound seemed to come from far away.
rainy | spring summer autumn | Rain drummed on the roofs and ran in bright streams past {landmark}. / It had been raining for hours, and the puddles near {landmark} had grown into ponds.
snowy | winter | Snow had covered {landmark} and turned every sound into a whisper. / Fresh snow lay along {landmark}, and not a single footprint crossed it.
windy | spring autumn winter | The wind tore at the shutters and chased dry leaves around {landmark}. / A hard wind blew from the hills and made the signs near {landmark} creak.
sunny | spring summer autumn | Sunlight lay on {landmark}, and even the old walls looked young. / The sun had come out early and warmed the ground around {landmark}.
frosty | winter autumn spring | Frost glittered on {landmark} like spilled sugar. / Every blade of grass near {landmark} was stiff with frost.
stormy | summer autumn winter | Thunder rolled behind the hills, and the sky over {landmark} turned the colour of slate. / The storm shook the windows and sent people running from {landmark}.
misty | spring summer autumn | A thin mist drifted around {landmark} and softened every edge. / Mist rose from the fields and hung about {landmark} like a veil.
hot | summer | The heat trembled above {landmark}, and even the dogs refused to move. / It was so hot that nobody crossed the open ground by {landmark}.
mild | spring autumn | The air was soft, and a few people lingered near {landmark} without their coats. / A gentle breeze carried the smell of wet earth past {landmark}.
grey | autumn winter spring | Low clouds hung over {landmark}, and the light never quite arrived. / The sky above {landmark} was as grey as an old coin.
clear | spring summer winter | The air was so clear that {landmark} seemed close enough to touch. / Not a single cloud hung over {landmark}, and sounds carried far.
"""

TIMES = ("morning", "afternoon", "evening")

THINGS = (
    "silver ring|brass key|painted box|gold watch|blue glass bottle|bundle of old photographs|small wooden flute|"
    "leather diary|pearl necklace|copper compass|ivory chess piece|music box|folded map|tin soldier|pocket mirror|"
    "carved walking stick|red silk scarf|medal"
).split("|")
ANIMALS = (
    "stray dog|injured owl|lost lamb|grey kitten|young fox|tired donkey|one-eyed cat|baby hedgehog|wild goose|tame crow"
).split("|")
RELATIVES = (
    "sister|brother|grandfather|grandmother|old teacher|old friend|cousin|aunt|uncle|former neighbour|daughter|son"
).split("|")
PRIZES = "cup|prize|blue ribbon|medal|place in the final|bag of coins".split("|")
SKILLS = "to swim|to dance|to read music|to ride a horse|to speak French|to sail|to play chess|to skate".split("|")

# what happens, as the prompt says it | how it came | what the person felt or did | how it ended
EVENTS = """
finds a {thing} under the floor | A loose board moved under {his} foot, and below it, wrapped in cloth, lay a {thing}. / {He} dropped {his} {tool}, and when {he} bent to pick it up {he} noticed a {thing} shining under the floor. | {He} held it up to the light and wondered whose hands had hidden it there. / For a while {he} only stared at it, hardly daring to breathe. | In the end {he} put the {thing} in the window, and within a week its owner came to claim it. / {He} never learned who had owned the {thing}, but {he} kept it on a shelf for the rest of {his} life.
loses a {thing} that belonged to a {relative} | When {he} reached into {his} pocket, the {thing} that had belonged to {his} {relative} was gone. / {He} noticed too late that the {thing} from {his} {relative} was no longer in its place. | {He} searched every corner and then walked all the way to {landmark} and back. / {He} emptied every drawer and asked everyone who came in. | A child brought the {thing} the next day and would not accept a reward. / {He} did not find the {thing}, but {his} {relative} only laughed and said that memories are harder to lose.
receives a letter from a {relative} | A boy ran up with a letter, and {name} knew the handwriting of {his} {relative} at once. / Between the bills there was a letter from {his} {relative}, the first in eleven years. | {He} read it twice, standing up, with {his} {tool} forgotten beside {him}. / {His} hands shook a little as {he} broke the seal. | The same evening {he} wrote an answer of nine pages and asked {his} {relative} to come home. / By the end of the month {his} {relative} sat at {his} table, and the two of them talked until dawn.
rescues a {animal} | A thin cry came from behind {landmark}, and there {he} found a {animal} caught in some wire. / On the way to {landmark} {he} almost stepped on a {animal} that could no longer move. | {He} wrapped it in {his} coat and carried it home without a word. / {He} talked to it softly until it stopped trembling. | The {animal} recovered in a week and then refused to leave {his} side. / When the {animal} was strong again {he} let it go, though {he} left the door open for many nights.
is followed home by a {animal} | {He} was locking up when {he} noticed a {animal} waiting politely at the door. / Halfway past {landmark} {he} turned around and saw a {animal} a few steps behind. | {He} told it to go away, but not very firmly. / {He} walked faster, and so did the {animal}. | By nightfall the {animal} was asleep beside the stove, and that was the end of the argument. / Since then the {animal} has had a name, a blanket and the best chair in the house.
wins a {prize} at the village fair | At the fair {he} expected nothing, but the judges called {his} name and handed {him} the {prize}. / {He} had entered the contest as a joke, and then the crowd cheered and {he} was holding the {prize}. | {He} blushed to the ears and forgot the speech {he} had prepared. / {He} looked around to see whether there was another {name}. | The {prize} now stands {at}, where every customer has to admire it. / {He} gave the {prize} to the youngest helper and went back to work the next day.
learns {skill} at the age of seventy | On {his} seventieth birthday {he} announced that {he} was going to learn {skill}. / At seventy {he} put down {his} {tool} for an hour a day and began to learn {skill}. | The neighbours smiled, and {he} let them smile. / The first lessons were a disaster, and {he} enjoyed every minute of them. | A year later the same neighbours asked whether {he} would teach them {skill} too. / By spring {he} was good enough to make {his} teacher nervous.
teaches a {relative} {skill} | {His} {relative} came to visit and admitted, a little ashamed, never having learned {skill}. / It was {his} {relative} who asked first: would {he} teach someone {skill}? | {He} was a patient teacher, and {he} praised every small success. / They started the same day, with much laughter and very little progress. | After a month {his} {relative} no longer needed any help and was proud to show it. / What {he} remembered later was not the lessons but the long talks in between.
forgets an important birthday | In the middle of {his} work {he} looked at the calendar and turned pale, for it was the birthday of {his} mother. / Somebody asked about the party, and only then did {he} remember whose birthday it was. | There was no present, no cake and less than an hour left. / {He} ran from {landmark} to the last open shop and found only candles. | So {he} told the truth, and they laughed together until the candles had burned down. / {He} made a gift with {his} own hands that night, and it was loved more than anything from a shop.
is visited by a stranger with a strange request | A stranger came in, shook the weather from a long coat and asked for something nobody had ever asked for. / The door opened, and a stranger laid a drawing on the table without saying a word. | {He} had been {craft} for years, yet this was new to {him}. / {He} should have said no, but {he} was far too curious. | It took three weeks, and when it was finished the stranger paid double and was never seen again. / When the work was done the stranger wept, and {he} understood that it had been worth the trouble.
repairs an old radio and hears a familiar voice | {He} had bought the broken radio for almost nothing, and now it crackled and began to speak. / After the last screw was tight the old radio hummed, and out of the noise came a voice {he} knew. | It was {his} brother, reading the news from a city far away. / {He} sat down slowly, because it sounded exactly like {his} late father. | {He} listened until the programme ended and then wrote to the station that very night. / From then on the radio played every evening, and the house no longer felt empty.
misses the last train home | {He} reached the platform just as the last train pulled away. / {He} had stayed too long over {his} work, and the lights of the last train were already small. | At first {he} was angry, then {he} simply began to walk. / There was nobody to ask and nowhere to sleep, so {he} turned up {his} collar. | On the long road {he} saw a sunrise that made up for everything. / A carter picked {him} up near {landmark}, and the two have been friends ever since.
discovers a hidden door | Behind a heavy cupboard {he} felt a draught, and then {his} fingers found the edge of a door. / {He} had passed that wall a thousand times before {he} noticed the outline of a door. | The hinges screamed, and cold air came up from the dark. / {He} fetched a lamp and went down eleven narrow steps. | Below there was a room full of toys, left by children who had grown up a century ago. / It led to a tiny courtyard with a fig tree, and {he} told nobody about it for years.
saves a child from drowning | A scream came from the water beyond {landmark}, and {he} ran before {he} had time to think. / {He} saw a small hand go under, dropped {his} {tool} and jumped. | The cold took {his} breath away, but {he} held on to the child. / Twice {he} lost the child, and twice {he} dived again. | When both were safe on the bank, the whole town seemed to be clapping. / The child brought {him} a drawing the following day, and it still hangs {at}.
decides to retire | {He} looked at {his} hands, then at {his} {tool}, and knew that it was time to stop. / Without any warning {he} hung up {his} apron and said that this day would be the last. | Nobody believed it at first, least of all {his} oldest customers. / It felt strange to sweep the floor and not to think of tomorrow. | A young apprentice took over, and {he} came by every day to give advice that nobody had asked for. / {He} gave {his} {tool} to the apprentice, walked to {landmark} and watched the clouds all afternoon.
plans a surprise for a {relative} | For weeks {he} had been planning something for {his} {relative}, and now everything was ready. / {He} had a secret: by nightfall {his} {relative} was going to have the surprise of a lifetime. | {He} could hardly keep a straight face when people asked what {he} was doing. / Twice {he} nearly gave it away, and twice {he} changed the subject. | When the lamps were lit and the music began, {his} {relative} could not say a word. / In the end the surprise failed, because {his} {relative} had known all along and had baked a cake.
meets a {relative} after many years | {He} looked up and saw a face {he} had not seen for half a lifetime: it was {his} {relative}. / Somebody called {his} name near {landmark}, and it was the voice of {his} {relative}. | Neither of them knew what to say, so they both said it at once. / They stood there like two people who have found the same coin. | They talked until the lamps went out, and the years between them grew small. / Before they parted, {his} {relative} promised not to wait so long again, and kept the promise.
hears music coming from an empty house | The house beside {landmark} had been empty for years, and yet somebody was playing the piano in it. / On {his} way past {landmark} {he} heard a slow waltz from a house where nobody lived. | {He} pushed the gate open and held {his} breath. / {He} told {himself} that it was the wind, but the wind does not keep time. | At the piano sat an old woman who had come back to say goodbye to her home. / Inside {he} found only an open window and a {thing} on the dusty keys.
gives away a {thing} to a hungry traveller | A traveller with hollow cheeks knocked and asked for bread, and {he} gave bread, soup and then a {thing} as well. / {He} saw how thin the traveller was, and before {he} knew it {he} had handed over {his} {thing}. | It was the only valuable thing {he} owned, but it felt light to give it. / The traveller did not want to take it, so {he} insisted. | Years later a parcel came from far away with the {thing} inside and a long letter of thanks. / {He} never saw the {thing} again, and {he} never missed it.
breaks a {thing} by accident | {He} turned too quickly, and the {thing} fell to the floor with a terrible sound. / {His} elbow touched the {thing}, and for one long second it seemed to hang in the air. | {He} looked at the pieces as if looking could put them together. / {He} said a word that {he} had not used since {his} youth. | It took three evenings to mend the {thing}, and the crack can only be seen by those who know. / The owner shrugged, told {him} that it had always been ugly, and bought {him} a drink.
builds a boat in secret | Every night, when the last customer had gone, {he} built a boat in the shed behind {landmark}. / Nobody knew why {he} bought so much timber, for the boat was hidden under sacks. | {He} had never done anything like it, and {craft} was poor preparation. / {He} worked by the light of one lamp and hummed while the planks took shape. | When it was finished the whole street came to see it float, and it did. / It leaked a little, but {he} sailed it past {landmark} with the pride of an admiral.
is mistaken for a famous actor | A lady near {landmark} cried out and asked {him} to sign her hat, for she took {him} for a famous actor. / It started with one whisper, and soon a small crowd was sure that {he} was a famous actor. | {He} explained that {he} was only good at {craft}, but nobody listened. / {He} bowed, because {he} could not think of anything better. | In the end {he} signed forty hats with {his} own name, and everyone went home happy. / The real actor arrived an hour later and was asked to wait in line.
keeps a promise made long ago | As a child {he} had made a promise, and now the day had come to keep it. / {He} had not forgotten what {he} had promised to an old friend thirty years before. | It would have been easy to stay {at}, where it was warm and the work was waiting. / {He} put on {his} best coat and left {his} {tool} where it was. | At noon the two friends met beside {landmark}, exactly as they had agreed. / {He} planted the tree as {he} had said {he} would, and it gives shade to this day.
grows the largest pumpkin anyone has seen | Behind the house, under straw, lay the largest pumpkin that anyone had ever seen. / It had begun as a seed like any other, but the pumpkin simply did not stop growing. | {He} measured it every day with a string and told the numbers to nobody. / It took six strong men and a door to lift it onto the cart. | The soup fed everyone between the church and {landmark}, and there was enough left for breakfast. / {He} kept the seeds, and now every garden for miles around has a giant in it.
quarrels with a {relative} over money | What began as a question about a small debt became a loud quarrel with {his} {relative}. / {His} {relative} counted the coins twice and said that something was missing. | Hard words were spoken, and a door was slammed. / {He} went back to work, but {his} hands would not obey {him}. | Three days later {he} found the missing coins in {his} own pocket and went to apologise. / They did not speak for a month, and then {his} {relative} came with a bottle and two glasses.
stays awake all night to finish a promised gift | The gift was promised for the next day, and half of it was still missing. / {He} lit another lamp, for {he} had promised a gift and the hours were running out. | {His} eyes burned, yet {his} hands were steady and sure. / Around midnight {he} made a mistake and had to begin again. | When the first birds sang the gift was ready, and {he} fell asleep on the table beside it. / {He} delivered it at dawn, and the smile {he} got was worth every lost hour.
finds out that a customer is a king in disguise | One quiet customer wore a plain coat, but the boots were much too fine. / The customer paid with a coin that showed his own face, and {name} looked twice. | {He} pretended to notice nothing and did {his} work as always. / {He} made a clumsy bow, and the king put a finger to his lips. | The king came back every year, always alone and always on foot. / Before leaving, the king asked for an honest opinion and, for once, received one.
starts a school for poor children | {He} had seen too many children idle near {landmark}, so {he} opened {his} door and started a school. / It began with three children, one slate and a borrowed bench. | {He} had no money for books, so {he} taught with whatever lay {at}. / By day {he} went on {craft}, and in the evening {he} explained letters and numbers. | Within a year there were forty pupils, and one of them later became mayor. / The pupils grew up, and each of them came back to teach one evening a week.
survives a flood | The water came in the dark, and before anyone could ring the bell it stood at the doors. / {He} woke because {his} shoes were floating past the bed. | {He} climbed to the roof with {his} {tool} under one arm and a neighbour's cat under the other. / {He} carried the old people one by one to the hill behind {landmark}. | When the water was gone everything was mud, but nobody was missing. / It took a whole year to rebuild, and they built it better than before.
falls in love with a traveller from abroad | A traveller from abroad came in to ask the way, and {he} forgot every street {he} knew. / The traveller spoke only a few words of the language, but they were the right ones. | {He} dropped {his} {tool} twice and blamed the cold. / They walked to {landmark} and back, and neither of them noticed the hour. | The traveller had planned to stay one night and is still there. / Letters went back and forth for a year, and then {he} packed a single bag.
"""

OPENINGS = (
    "{When}, {name}, {a_trade} in {place}, was hard at work {at}.",
    "It was a {day} in {place}, and {name} the {trade} was busy {at}.",
    "In {place} everyone knew {name} the {trade}, and everyone remembers what happened {when}.",
    "{name} was {a_trade} in {place}, and {when} there was more to do than usual.",
    "Nothing much ever happened in {place}, and {name} the {trade} expected nothing new {when}.",
    "The {day} began like any other in {place}, where {name} worked as {a_trade}.",
    "Of all the people in {place}, it was {name} the {trade} who would remember that {day} best.",
)
WORK = (
    "{He} had spent hours {craft}, as on any other day of the year.",
    "As usual {he} {did}, with {his} {tool} never far from {his} hand.",
    "{He} {did}, humming a tune that {his} mother had taught {him}.",
    "People said that nobody for miles around was better at {craft}.",
    "For twenty years {he} had made a living by {craft}, and {his} {tool} showed the wear.",
    "{He} {did}, and {his} thoughts wandered far away.",
)
CLOSINGS = (
    "To this day people in {town} tell the story of {name} the {trade}.",
    "{name} went back to {craft}, but something had changed for good.",
    "That is how {name} came to believe that a {day} can change everything.",
    "Whenever the talk turns to luck, somebody in {town} mentions {name}.",
    "And {name} the {trade} smiled and picked up the {tool} again.",
    "Some stories end with a moral, but this one ended with a good supper.",
)

PROMPTS = (
    "Write a short paragraph about {name}, {a_trade} in {place}, who {event}. It is a {day}.",
    "Write a short paragraph about {name}, {a_trade} in {place} {when}, who {event}.",
    "Tell me a short story about {a_trade} named {name} who {event}. It takes place in {place} {when}.",
    "Describe in one paragraph how {name}, {a_trade} in {place}, {event} {when}.",
    "{When}, {name} the {trade} {event}. Tell what happens in {place} in a few sentences.",
    "I would like a brief tale set in {place} {when}. It is about {name}, {a_trade}, who {event}.",
    "Please write a few sentences about a {day} in {place}: {name} the {trade} {event}.",
    "Compose a short passage. Person: {name}, {a_trade}. Place: {place}. Time: a {day}. What happens: {name} {event}.",
)
