"""Text to measure on where a user gives none: plain English of several kinds, written for this."""

__all__ = ["SENTENCES"]

SENTENCES = (
    "The ferry leaves the harbour at seven in the morning and comes back shortly before dark.",
    "Blue Heron is a small restaurant by the river. It serves fish and costs less than twenty pounds.",
    "When the rain had stopped, the children ran out into the garden and looked for snails under the leaves.",
    "A matrix of rank one is the product of a column and a row; a sum of a few of them is still cheap to store.",
    "The council will decide on Tuesday whether the old bridge can be repaired or has to be replaced.",
    "Put the flour into a bowl, make a hollow in the middle, and pour in the warm milk with the yeast.",
    "She had read the letter twice before she understood that it was not meant for her.",
    "Water boils at a lower temperature in the mountains, because there is less air above it.",
    "Could you tell me how to get to the station from here? It is the second street on the left.",
    "In the first half both teams were careful, and after an hour there was still no goal.",
    "The company said that it had sold more bicycles last year than in the three years before.",
    "He put his tools back into the box, wiped his hands, and asked for a glass of water.",
    "Bees find their way by the position of the sun, even when clouds hide it from our eyes.",
    "There is a family hotel near the city centre; it has a pool, free parking, and rooms for children.",
    "The museum shows maps of the fourteenth century, some of which have never been seen in public.",
    "If the light on the front turns red, switch the machine off and wait for ten minutes.",
    "My grandfather built this boat with his brother in the winter of 1952, and it has never leaked.",
    "The results are the same to the last digit, whichever of the two programs is used.",
    "Nobody in the village could remember a summer as dry as this one.",
    "The train was late, so we sat in the café, drank tea, and talked about the film.",
    "I would like to book a table for four people on Friday evening, outside if that is possible.",
    "The river is two hundred miles long and flows into a lake that has no outlet to the sea.",
    "After the election the new mayor thanked her voters and promised cheaper buses.",
    "A good map leaves out nearly everything, and what it keeps is what one needs to know.",
)
