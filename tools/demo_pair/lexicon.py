"""Names the built-in grammars share."""

WOMEN = (
    "Ada Agnes Alice Amara Anna Beatrice Bella Carmen Celia Clara Dalia Dora Edith Elena Ellen Emma Esther Eva "
    "Farah Fiona Flora Freya Grace Greta Hannah Hazel Helen Ida Ines Iris Isabel Ivy Jana Jane Joan Julia Kate Keiko "
    "Laila Lena Leonie Lily Lucia Mabel Maeve Maria Martha Maya Mei Mina Miriam Nadia Nina Nora Olga Olive Petra "
    "Pia Priya Rosa Ruth Sadie Sara Selma Sofia Stella Tara Tessa Thea Uma Vera Violet Wanda Willa Yara Zoe"
).split()
MEN = (
    "Aaron Adam Ahmed Albert Alfie Amir Andrew Anton Ben Bruno Carl Carlos Caleb Cyrus Daniel David Dmitri Edgar Elias "
    "Emil Enzo Felix Finn Frank George Gideon Hans Hassan Henry Hugo Ian Isaac Ivan Jack Jakob Jamal Joel Jonas Joseph "
    "Karim Kenji Lars Leo Liam Louis Luca Malik Marcus Martin Mateo Max Milo Nathan Noah Oliver Omar Oscar Otto Owen "
    "Pablo Paul Peter Rafael Ravi Robert Rufus Sam Samir Simon Stefan Theo Thomas Tobias Victor Walter Yusuf"
).split()
CITIES = (
    "Paris London Oslo Cairo Lima Tokyo Delhi Madrid Boston Dublin Vienna Prague Athens Denver Seoul Rome "
    "Milan Lisbon Berlin Geneva Turin Porto Nairobi Sydney Toronto Chicago Austin Dallas Helsinki Warsaw"
).split()
COUNTRIES = (
    "France Spain Italy Norway Japan Brazil Canada Egypt Kenya India Chile Peru Mexico Greece Poland Sweden "
    "Germany Austria Finland Ireland Portugal Turkey Vietnam Morocco"
).split()
