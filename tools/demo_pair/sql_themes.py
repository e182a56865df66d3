"""Databases the SQL workload asks about, as data.

A blank line ends a database; a line is one table: its singular and plural noun, a colon, and its columns.
`x=a/b/c` is text with those values, `x=@pool` text from a shared pool, `x=1..9` whole numbers, and `>noun`
a foreign key to the table of that noun. The first column is what people call a row by. `|` between names
offers alternatives, of which each prompt sees one.
"""

THEMES = """
shop|store shops|stores: name=@word, city=@city, opening_year|founded=1950..2022, floor_area|size=80..4000
product|item products|items: name|title=lamp/chair/kettle/mirror/rug/clock, price|cost=5..900, colour=@colour, weight=1..60, brand=@word, >shop
sale|purchase sales|purchases: sale_date|day=@date, quantity|units=1..40, discount=0..50, payment_method=cash/card/voucher, >product

hospital|clinic hospitals|clinics: name=@word, city=@city, bed_count|beds=20..900, opening_year=1900..2020, rating=1..10
doctor|physician doctors|physicians: name|last_name=@person, specialty=cardiology/surgery/neurology/oncology/pediatrics, salary=50000..250000, experience_years=1..40, >hospital
patient patients: name|first_name=@person, age=1..95, blood_type=A/B/AB/O, height=90..200, city|home_city=@city, >doctor

library libraries: name=@word, city=@city, book_count=1000..90000, floor_count=1..8
book|volume books|volumes: title=@word, genre=fantasy/history/science/poetry/mystery, page_count|pages=60..1200, publication_year|year=1850..2023, author|writer=@person, >library
loan loans: loan_date=@date, duration_days|days=1..60, fine|late_fee=0..40, status=open/returned/overdue, >book

airline|carrier airlines|carriers: name=@word, country=@country, fleet_size=5..600, founded=1920..2015
flight flights: flight_number|code=@code, origin=@city, destination=@city, distance=100..9000, price|fare=40..1500, >airline
passenger|traveller passengers|travellers: name|full_name=@person, age=1..90, nationality=@country, bag_count|bags=0..4, seat_class=economy/business/first, >flight

school schools: name=@word, city=@city, founded|opening_year=1850..2020, budget=100000..9000000
teacher|instructor teachers|instructors: name=@person, subject=maths/history/biology/music/art, age=23..68, salary=25000..90000, >school
student|pupil students|pupils: name|first_name=@person, grade=1..12, score|exam_score=0..100, home_city|city=@city, gender=female/male, >school

farm farms: name=@word, region=north/south/east/west, area|hectares=5..900, founded=1850..2020, owner=@person
animal animals: name=@word, species=cow/goat/sheep/horse/pig, weight=10..900, age=0..25, >farm
harvest harvests: crop=wheat/corn/barley/oats/beans, tons|yield=1..400, year=1990..2023, quality=high/medium/low, >farm

team|club teams|clubs: name=@word, city|home_city=@city, founded=1880..2015, budget=100000..9000000
player|athlete players|athletes: name|full_name=@person, position=goalkeeper/defender/midfielder/forward, age=16..41, goals=0..60, salary|wage=20000..900000, nationality=@country, >team
match matches: match_date=@date, opponent=@word, attendance|spectators=100..80000, result=win/loss/draw, >team

museum museums: name=@word, city=@city, opening_year=1750..2020, ticket_price=0..40, visitor_count|visitors=1000..900000
artist|painter artists|painters: name=@person, nationality=@country, birth_year=1400..2000, style=baroque/modern/cubist/realist
painting|artwork paintings|artworks: title=@word, year=1450..2020, price|value=1000..900000, height=10..400, width=10..600, >artist, >museum

restaurant|bistro restaurants|bistros: name=@word, city=@city, cuisine=thai/italian/french/indian/greek, rating|stars=1..10, seat_count|seats=10..300
dish|meal dishes|meals: name=@word, price=3..90, calories=50..1800, course=starter/main/dessert, spice_level=0..5, >restaurant
review reviews: reviewer|author=@person, score=1..10, review_date=@date, helpful_votes|votes=0..200, >restaurant

company|firm companies|firms: name=@word, industry|sector=retail/banking/energy/media/transport, revenue=1..9000, country=@country, founded=1880..2022
department|division departments|divisions: name=sales/legal/finance/design/support, budget=10000..900000, floor=1..40, >company
employee|worker employees|workers: name|last_name=@person, salary|wage=20000..190000, age=18..67, job_title|role=clerk/manager/analyst/engineer/driver, hire_year=1990..2023, >department

hotel|inn hotels|inns: name=@word, city=@city, star_rating|stars=1..5, room_count=10..900
room rooms: room_number=@code, price|nightly_price=30..900, capacity=1..6, view=sea/garden/street/park, >hotel
booking|reservation bookings|reservations: guest_name|guest=@person, nights=1..21, check_in_date|arrival=@date, total_cost|total=40..9000, >room

film|movie films|movies: title=@word, genre=drama/comedy/thriller/horror/western, year|release_year=1930..2023, running_time|length=60..220, budget=1..300, >director
director directors: name=@person, nationality=@country, birth_year=1890..1995, award_count|awards=0..20
screening|showing screenings|showings: screening_date=@date, city=@city, ticket_count|tickets=5..900, ticket_price=4..30, >film

bank|lender banks|lenders: name=@word, country=@country, asset_value|assets=1..9000, founded=1700..2015
account accounts: owner|holder=@person, balance=0..90000, kind=savings/checking/business, opening_year|opened=1980..2023, >bank
payment|transfer payments|transfers: amount=1..9000, payment_date=@date, currency=EUR/USD/GBP/JPY, status=pending/settled/failed, >account

train trains: name=@word, operator=@word, top_speed|speed=80..320, seat_count=50..900, build_year=1970..2022
station|stop stations|stops: name=@word, city=@city, platform_count|platforms=1..24, opening_year=1840..2020, daily_passengers=100..90000
service|trip services|trips: departure_day|day=monday/friday/sunday, delay_minutes|delay=0..120, ticket_price|price=5..200, >train, >station

publisher publishers: name=@word, city=@city, founded=1800..2015, staff_count|staff=3..900
magazine|journal magazines|journals: title=@word, topic=science/fashion/sports/travel/cooking, price=2..25, circulation=500..90000, >publisher
article|story articles|stories: headline|title=@word, author=@person, word_count|words=200..9000, publication_date=@date, >magazine

garden|park gardens|parks: name=@word, city=@city, area=1..300, opening_year=1800..2020, entrance_fee|fee=0..25
plant plants: name|common_name=rose/tulip/fern/maple/lily/oak, height=5..900, colour=@colour, plant_year=1950..2023, >garden
visit visits: visitor_name|visitor=@person, visit_date=@date, duration_minutes|minutes=10..400, ticket_type=adult/child/senior, >garden

driver drivers: name=@person, age=18..75, licence_year=1970..2022, home_city|city=@city, rating=1..10
vehicle|car vehicles|cars: model=@word, colour=@colour, build_year|year=1985..2023, mileage=100..300000, price=900..90000, >driver
repair|service repairs|services: repair_date=@date, cost|price=20..5000, part=brake/clutch/engine/tyre/window, hours=1..30, >vehicle

singer|musician singers|musicians: name=@person, country=@country, birth_year=1940..2005, genre=pop/rock/jazz/folk/soul
album|record albums|records: title=@word, release_year|year=1960..2023, copies_sold|sales=100..900000, label=@word, >singer
song|track songs|tracks: title=@word, duration_seconds|seconds=60..600, rating|score=1..10, language=english/spanish/french/hindi, >album

warehouse|depot warehouses|depots: name=@word, city=@city, capacity=100..90000, manager=@person, rent=500..90000
supplier|vendor suppliers|vendors: name=@word, country=@country, rating=1..10, contract_year=1995..2023
shipment|delivery shipments|deliveries: weight=1..9000, arrival_date=@date, status=sent/delayed/delivered/lost, shipping_cost|cost=5..4000, >supplier, >warehouse

university universities: name=@word, city=@city, founded=1200..2010, tuition|fee=0..60000, enrolment=500..60000
professor|lecturer professors|lecturers: name=@person, field=physics/law/economics/chemistry/philosophy, publication_count|papers=0..300, age=28..75, >university
course courses: title=@word, credits=1..12, level=bachelor/master/doctoral, enrolled_students|students=3..600, >professor

tenant|renter tenants|renters: name=@person, age=18..90, occupation|job=nurse/baker/lawyer/pilot/artist, income=12000..190000
building|house buildings|houses: address=@word, city=@city, floor_count|floors=1..60, build_year=1850..2023
lease|contract leases|contracts: monthly_rent|rent=200..6000, start_date=@date, months|duration=3..60, >tenant, >building

zoo zoos: name=@word, country=@country, area=1..400, visitor_count|visitors=1000..900000, opening_year=1850..2015
keeper|caretaker keepers|caretakers: name=@person, age=18..66, salary=18000..70000, shift=morning/evening/night, >zoo
creature|animal creatures|animals: name=@word, species=lion/zebra/panda/otter/eagle, weight=1..6000, birth_year=1980..2023, >keeper

ship|vessel ships|vessels: name=@word, flag|country=@country, length=10..400, build_year=1950..2023, crew_size|crew=3..900
port|harbour ports|harbours: name=@word, country=@country, depth=4..40, berth_count|berths=1..120
voyage|journey voyages|journeys: departure_date=@date, cargo=grain/oil/steel/fruit/timber, distance=50..12000, profit=100..90000, >ship, >port

gym|studio gyms|studios: name=@word, city=@city, monthly_fee|fee=10..200, opening_year=1980..2023
trainer|coach trainers|coaches: name=@person, speciality=yoga/boxing/rowing/pilates, hourly_rate|rate=15..150, experience_years=1..35, >gym
member members: name|full_name=@person, age=14..85, join_year=2000..2023, visit_count|visits=0..400, plan=basic/plus/premium, >gym

laboratory|lab laboratories|labs: name=@word, city=@city, budget=10000..900000, staff_count=2..300
scientist|researcher scientists|researchers: name=@person, field=genetics/optics/robotics/ecology, age=24..72, citation_count|citations=0..90000, >laboratory
experiment|trial experiments|trials: title=@word, start_date=@date, cost=100..90000, outcome=success/failure/unclear, duration_days|days=1..900, >scientist

village villages: name=@word, country=@country, population=50..9000, elevation=0..3000
household|family households|families: name=@word, member_count|members=1..12, income=5000..150000, dwelling=house/flat/cabin/farmhouse, >village
pet pets: name=@word, species|kind=dog/cat/rabbit/parrot/hamster, age=0..20, weight=1..70, colour=@colour, >household

theatre|playhouse theatres|playhouses: name=@word, city=@city, seat_count|capacity=40..3000, opening_year=1750..2020
play|drama plays|dramas: title=@word, author|playwright=@person, premiere_year|year=1600..2023, act_count|acts=1..6, >theatre
actor|performer actors|performers: name=@person, age=18..85, role_type=lead/support/chorus, fee|pay=100..20000, >play

phone|device phones|devices: model|name=@word, brand=@word, price=90..1900, memory|storage=16..1024, release_year|year=2008..2023
buyer|customer buyers|customers: name=@person, city=@city, age=16..85, loyalty_points|points=0..9000
order|purchase orders|purchases: order_date=@date, quantity=1..9, status=open/shipped/cancelled/returned, total_price|total=90..9000, >buyer, >phone

river rivers: name=@word, country=@country, length=10..6000, depth=1..90
bridge bridges: name=@word, build_year=1700..2023, span|length=10..2000, material=stone/steel/wood/concrete, cost=1..900, >river
inspection|check inspections|checks: inspector=@person, inspection_date=@date, grade|score=1..10, defect_count|defects=0..40, >bridge

festival festivals: name=@word, city=@city, founded=1950..2022, ticket_price=5..400, visitor_count|attendance=100..90000
band|group bands|groups: name=@word, genre=rock/folk/metal/jazz/blues, member_count|members=1..12, formed_year=1960..2022, country=@country
concert|show concerts|shows: stage=main/lake/forest/tent, concert_date=@date, length_minutes|minutes=20..180, fee|pay=100..90000, >band, >festival

mine|quarry mines|quarries: name=@word, country=@country, depth=10..3000, mineral=gold/copper/salt/coal/iron, output=10..9000
miner|worker miners|workers: name=@person, age=18..64, wage|salary=15000..90000, shift=day/night, hire_year=1985..2023, >mine
accident|incident accidents|incidents: accident_date=@date, severity=1..10, cause=fire/flood/collapse/gas, lost_days=0..90, >mine

vineyard|winery vineyards|wineries: name=@word, region=north/south/east/west/coast, area|hectares=1..400, founded=1700..2018, owner=@person
wine wines: name=@word, grape=merlot/riesling/malbec/pinot, vintage|year=1970..2022, price=4..900, rating|points=50..100, >vineyard
tasting tastings: taster|judge=@person, tasting_date=@date, score=1..20, note_count|notes=0..15, >wine

app|program apps|programs: name=@word, category=games/finance/health/travel, price=0..60, download_count|downloads=10..900000, release_year=2009..2023
developer|coder developers|coders: name=@person, country=@country, salary=20000..220000, language=python/java/rust/go, >app
bug|defect bugs|defects: title=@word, severity|priority=1..10, report_date=@date, status=open/fixed/ignored, fix_hours|hours=1..300, >app

court courts: name=@word, city=@city, founded=1800..2010, judge_count=1..60
lawyer|attorney lawyers|attorneys: name=@person, hourly_fee|fee=60..900, field=criminal/family/tax/labour, win_count|wins=0..400, age=26..78
case|lawsuit cases|lawsuits: title=@word, filing_date=@date, claim_amount|amount=100..90000, verdict=guilty/settled/dismissed, hearing_count|hearings=1..40, >lawyer, >court

bakery|cafe bakeries|cafes: name=@word, city=@city, opening_year|founded=1900..2023, table_count|tables=0..60
baker|chef bakers|chefs: name=@person, age=17..70, wage=15000..60000, speciality=bread/cakes/pies/pastry, >bakery
cake cakes: flavour|name=lemon/cherry/vanilla/walnut/almond, price=2..90, weight=1..12, layers=1..7, sold_count|sold=0..900, >bakery

satellite satellites: name=@word, country=@country, launch_year|year=1960..2023, mass|weight=1..9000, altitude=160..36000
mission missions: title|name=@word, goal=weather/mapping/science/telecom, cost|budget=1..9000, duration_days|days=1..5000, >satellite
signal signals: signal_date|day=@date, strength|power=1..100, channel|band=alpha/beta/gamma/delta, >satellite
"""

POOLS = {
    "word": (
        "Aurora Beacon Cedar Delta Ember Falcon Granite Harbor Indigo Juniper Kestrel Lantern Meadow Nimbus Orchard "
        "Pioneer Quartz Raven Summit Thistle Umber Vista Willow Zephyr Atlas Birch Comet Dune Echo Fjord Glacier Haven"
    ).split(),
    "colour": "red blue green black white yellow grey brown".split(),
}
